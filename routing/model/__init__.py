"""Plain values: amounts, requests, jobs, states, messages. Nothing here asks a store or a clock."""
