#!lua flags=allow-oom
-- Does: ends the reservation for a shape, and notes which workers are reserved.
-- KEYS: none; by name: epoch, book, kept, free, free_of, view, allocated, allocated_cpus
-- ARGV: epoch, run_id, shape ('': none), reserved (as `note_reserved` of lib/reservation.lua)
-- Replies: {ok, freed (the worker that was reserved for the shape, and is to be filled; '': none)} | {cold} | {epoch,
--   current}
-- Cost: constant, and two commands for each index of free CPUs in which the worker stands
-- Repeat: harmless
note_reserved(reserved)
return {'ok', shape ~= '' and unkeep(shape, epoch) or ''}
