"""Actions of operators, one function each, for the commands and the API. The audit has each of them."""
