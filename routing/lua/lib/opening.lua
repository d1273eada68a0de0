-- The workers that take jobs.

-- True if a worker may take a job: it is ready, not cordoned, not over its capacity, and has a free slot, which every
-- job needs. No job that must be alone runs there.
local function has_opening(book)
  return book.status == 'ready' and not book.cordoned and not over(book) and room(book, 'slots') >= 1
    and (book.allocated.alone or 0) == 0
end

-- True if any job may be admitted to a worker, so that it stands in the indexes of free CPUs: it is kept for none.
local function is_open(book)
  return has_opening(book) and not book.kept
end
