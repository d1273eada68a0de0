"""The ways that were weighed, as small stand-ins beside the platform: `python -m benchmarks proposals`.

Each answers the same three questions (how much is taken, how much is free on each worker, and please admit one job)
for the same cluster, and is measured in the same run, call by call in turn. What the results mean stands in
docs/RESOURCE_OPTIMIZATION_PROPOSALS.md, whose tables the run rewrites.

    way            what a way can be asked, and the cluster that all are asked about
    counts         CPU counts in a JSON file, under a lock
    sums           jobs in Postgres, and sums over them
    columns        what is taken, as a column in Postgres
    cache          what is free, in Redis alone
    registration   workers that register and renew a lease, over both stores: the platform's own code
    measure        latency, callers at once, rows, a worker that died, a store that was emptied
    report         results.json and the tables of the page
"""
