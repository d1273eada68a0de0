"""Steady load: jobs arrive at a fixed rate, whether or not those before them are done (an open loop).

A job's latency is the time from the moment at which it was due to the end of its body. So a sender that falls behind
makes latencies longer instead of hiding them.

    load     a side under a fixed rate: processes, and the latencies that its tasks note
    soak     `make soak`: memory, latency and disk stay what they are
    curve    `make bench-load`: latency by rate, ours beside plain Celery
    drawing  the curve as SVG
"""
