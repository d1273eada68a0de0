"""Ours beside plain Celery: `python -m benchmarks` (or `make bench`).

Every figure is measured by one function, in the file of its family. It starts its own servers, runs both
sides on them in turn, and gives back one value per round and side; the report takes medians and the ratio.

    figures        the figures: names, units, targets
    throughput, backlog, latency, packing, scripts, registration, spending    how they are measured
    costs          the costs of one job, beside plain Celery and beside another checkout
    steady         jobs at a fixed rate: a soak, and latency by rate
    peers          ours beside other systems
    bench          what a figure is given: rounds, servers, both sides, progress
    rounds         turns, medians, percentiles
    servers        one private pair of servers per figure, and the environment each side sees
    processes      worker and submitter processes of either side, and how to wait for them
    submitter      the submitting process, the same code for both sides
    ours, plain    the two applications
    tasks          the tasks that both run
    books          a ledger with any number of workers, without processes
    report         table, results.json, the table in the docs
"""
