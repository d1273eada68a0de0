"""Decides: which job may run on which worker, and when. No Celery in here.

The protocol, told once
=======================

A **job** is a Celery message with a row in Postgres; a **worker** publishes its capacity as a *book* in Redis; an
**allocation** is what an admitted job holds on one worker. Postgres is the truth, the books are the fast ledger.

1. *Accept.* The sender inserts the row with the whole message, in one autocommitted statement (`insert.inserter`).
   From here on the job cannot be lost. The insert returns the authority row, so it confirms the epoch as well.
2. *Admit or file.* One script (`submit`) chooses a worker with room for the whole request, allocates, and pushes the
   message into that worker's own queue, all in one atomic step; or files the job under its *shape* in the backlog. Of
   jobs that a process submits in a row, a thread brings several at once (`submit_many`); it may die before, as in 1.
3. *Claim.* The worker takes the message and claims the lease (`claim`). Only the holder of the current token
   `(epoch, attempt)` gets it; a stale or doubled message is dropped.
4. *Release.* When the attempt is over, one script (`release`) gives back the allocation first, admits to that worker
   what now fits, and notes the outcome in the stream. The next jobs come in its answer, claimed already (large ones by
   the broker, as at the submit). **Then** Postgres gets the state, in batches.
5. *Repair.* Duties find what a crash between two steps left.

Who can die where, and who repairs it:

=============================================  ================================================================  =======
the process dies                               repaired by                                                       within
=============================================  ================================================================  =======
the caller, before the insert commits          nobody: the caller has an error, nothing was written
the caller, around the commit                  the caller submits again with the same id (`OutcomeUnknown`)
the caller, between insert and script          sweep: rows that are still `accepted` after 10 s are submitted    20 s
any process, after the script                  the stream has `admitted`; whoever runs the duties writes it to   2 s
                                               Postgres
Redis loses the message                        redelivery (START, 15 s): the same attempt is delivered again     25 s
the worker, before it claims                   redelivery; when the worker is dead, the lapse                    76 s
the worker, while the body runs                lapse (TTL, LOST): the job is taken back as a new attempt         76 s
the process of the body                        its worker releases the attempt as lost: a new attempt            2 s
the worker, body ended, release not sent       lapse: the attempt counts as lost and runs again (at least once)  76 s
the answer of a release is lost                `hand_over_again`: the worker asks for what it holds and does     5 s
                                               not know
the worker, released, Postgres not written     the stream has the outcome; whoever runs the duties writes it     2 s
Redis loses everything                         the epoch is missing: COLD, nobody admits; one process begins     10 s
                                               the next epoch in Postgres and opens it, workers say what they
                                               hold
the process that opens an epoch, or it stops   another process begins the epoch after it                         21 s
Redis is gone, whatever the broker is          every worker says so in Postgres: that decides, workers pull      30 s
                                               from it, until Redis has answered for a while; then a new epoch
                                               is opened
both stores, when a worker starts              the worker waits for them, and says for what
the writer of an end that other jobs wait for  the end is noted for them in the same transaction; `due` lifts    1 s
                                               their constraints
none: Postgres always refuses a transition     its writer sets it aside, and marks the row                       at once
a revoke: row marked, ledger not told          nothing brings a marked row in; sweep: a marked job that has not  10 s
                                               ended is told again (`revoking`), and ends if no worker holds it
the elected worker, in a duty                  the worker that is elected next continues                         10 s
the elected worker stops, and continues later  nobody: its lease is over, and it does no duty more
beat                                           nobody need: the elected worker runs the duties by itself
=============================================  ================================================================  =======

Three rules make the repairs safe to run twice, at once, and by hand. The *token* only grows: a write that carries an
older one is refused by the script and by the WHERE of the statement. A *missing book is not a free worker*: a key that
is not there, or of another epoch, admits nothing. *Every transition is an entry of the stream*, written by the script
that made it, until Postgres has it: Postgres is behind by exactly these entries.

*Who decides* is one row in Postgres: `(epoch, authority)`. It names Postgres only when every live worker has lost the
ledger for as long as an answer about the row is valid (10 s), and after each change nobody decides for as long again:
so nobody can believe the one while another acts on the other. While Postgres decides, a worker takes what fits beside
what it holds in one statement whose WHERE compares the row (`pull`), and ends are written by their token.

Where to look: `policy` is the decision in plain Python, `lua/` the same in Redis (held to it by tests), `ledger` the
typed calls, `keys` every key, `states` the table of transitions, `insert` and `store` the SQL, `rebuild` and
`reconcile` how the books are made anew and compared.
"""
