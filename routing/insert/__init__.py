"""How rows enter the table of jobs: one, many, in the transaction of a caller, as a successor."""
