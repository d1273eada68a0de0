"""Orders: a table, two views and the tasks behind them."""
