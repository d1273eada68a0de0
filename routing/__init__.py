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

================================================  =====================================================================
the process dies                                  repaired by
================================================  =====================================================================
before the insert commits                         nobody: the caller has an error, nothing was written
between insert and script                         sweep: rows that are still `accepted` are submitted (10 s)
after the script, before the message is read      redelivery (START): the same attempt is delivered again
worker took the message, did not claim            redelivery; when the worker is dead, the lapse
worker claimed, body runs                         lapse (TTL, LOST): the job is taken back as a new attempt
body ended, release not sent                      lapse: the attempt counts as lost and runs again (at least once)
released, the answer with the next jobs is lost   `hand_over_again`: the worker asks for what it holds and does not know
released, Postgres not written                    the stream has the outcome; whoever runs the duty applies it
Redis loses everything                            the epoch is missing: COLD, nobody admits; one process begins the
                                                  next epoch in Postgres and opens it, workers say what they hold
Redis is gone, whatever the broker is             every worker says so in Postgres: that decides, workers pull from it,
                                                  until Redis has answered for a while; then a new epoch is opened
both stores are down when a worker starts         it waits for them, and says for what
a job is revoked, row marked, ledger not told     nothing brings a marked row in; sweep: what is marked and has not
                                                  ended is told again (`revoking`), and ends if no worker holds it
================================================  =====================================================================

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
