-- Indexes of waiting shapes beside the whole index.

-- The index of waiting shapes in which a shape stands beside the whole index. For a tenant, but the default one, it is
-- the index of that tenant. For a queue it is the index of that
-- queue. In the default queue it is the index of the shape's first resource that not every worker has. A shape with
-- alternatives stands among those without such a resource: any worker may have one of them.
local function shapes_beside(shape)
  if string.find(shape, ',$', 1, true) then
    return KEY.shapes_of .. '$' .. tenant_of(shape)
  end
  local label = label_of(shape)
  if label then
    return KEY.shapes_of .. label
  end
  local name, at = string.match(shape, '^([^=,]+)=%d+,?()')
  while name and not string.find(shape, ',|', 1, true) do
    if has_index(name) then
      return KEY.shapes_of .. name
    end
    name, at = string.match(shape, '^([^=,]+)=%d+,?()', at)
  end
  return KEY.shapes_of .. LIMIT.unlabelled
end

-- Note the order of the first job of a shape's tenant, or that none waits. The default tenant has no such note.
local function note_head(shape)
  if not string.find(shape, ',$', 1, true) then
    return
  end
  local head = redis.call('ZRANGE', shapes_beside(shape), 0, 0, 'WITHSCORES')
  if head[2] then
    redis.call('ZADD', KEY.tenant_heads, head[2], tenant_of(shape))
  else
    redis.call('ZREM', KEY.tenant_heads, tenant_of(shape))
  end
end
