"""The costs of one job: `python -m benchmarks.costs` (or `make bench-costs`).

CPU time, commands, round trips, thread switches and system calls of a job say where its time goes, and depend less on
what else the machine does than times do. Each contender has servers of its own, so that no other one's idle worker
counts.

    reading       totals of processes and servers, and what a job's part of a difference is
    system_calls  the system calls of processes, counted by perf
    contender     a side of a checkout: servers, a submitter and a worker
    measuring     the figures: submit, file, drain, ...
    report        the table, and its JSON
    lives         Redis commands of a job, on a ledger without processes
    stored        the stored costs, which a change may not exceed by more than a tenth
    checking      the comparison with them
"""
