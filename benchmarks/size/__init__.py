"""The platform at the size of a large cluster: `python -m benchmarks.size`.

What is measured runs the platform's own code on private servers; only what would take machines is simulated. A worker
of the crowd has all threads of a real one (heartbeat, ledger queue, settling with the ledger) and no pool: its jobs end
after a while without a body.

    stock       rows of a platform that has been at work for long
    crowd       a process with many workers
    admitting   a process that submits and releases, and notes how long each admission took
    rebuild     an emptied Redis is filled again
    head        a million waiting jobs, of which Redis holds the first
    comparing   reconcile of 100,000 jobs, while work goes on
    working     1,000 workers take 10,000 jobs
    ledger_alone  10,000 beating workers and a million waiting jobs, by the calls of the ledger
    rules       the cost of the scheduler's rules in use: reservations
    rates       Redis's time for each call of a job, and the highest rate that follows
    drawing     the picture of the rates
    keeping     a million finished rows, before and after they moved into the archive
    figures     names, units, targets
    report      results.json and the table of docs/reference/size.md
"""
