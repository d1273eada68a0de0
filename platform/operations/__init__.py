"""Actions of operators, one function each, for the commands, the page and the API. The audit has each of them."""
