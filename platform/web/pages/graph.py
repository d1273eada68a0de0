"""The workflow of a job as a graph: a column for each step, with jobs that are alike as one tile. Units are pixels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from celery_capacity.platform.console.fitting import shorten_end
from celery_capacity.platform.web.workflow import Link, Member, Workflow
from celery_capacity.routing.model.states import State

#: Size of a tile, and of the room between tiles.
TILE: Final = (190, 44)
ROOM: Final = (50, 14)
#: Characters of a name in a tile.
NAME: Final = 24
#: Jobs alike that are drawn one by one; of more, one tile stands for all.
FEW: Final = 4
#: Tiles that are drawn.
MAX_TILES: Final = 80
#: Word for a step that is not submitted yet.
AHEAD: Final = "not submitted"
#: Classes of the style sheet by state; other states have their own.
COLOURS: Final[dict[str, str]] = {
    State.ACCEPTED.value: "t-waiting",
    State.WAITING.value: "t-waiting",
    State.SCHEDULED.value: "t-waiting",
    State.ADMITTED.value: "t-starting",
    AHEAD: "other",
}


@dataclass(frozen=True, slots=True)
class Tile:
    """A job, or jobs that are alike. `first`: the id of the first of them. `current`: the job of the page is in it."""

    first: str
    task: str
    states: Sequence[tuple[str, int]]
    number: int
    group: str | None
    current: bool
    x: int
    y: int

    @property
    def name(self) -> str:
        return shorten_end(self.task, NAME)

    @property
    def colour(self) -> str:
        """Return the class of the worst state."""
        order = [State.LOST, State.FAILED, State.RUNNING, State.ADMITTED, State.WAITING]
        names = [state for state, _ in self.states]
        worst = next((state for state in order if state in names), names[0])
        return COLOURS.get(worst, f"t-{worst}")


@dataclass(frozen=True, slots=True)
class Edge:
    """A link from a tile to the next one. `path`: of SVG."""

    path: str
    kind: Link


@dataclass(frozen=True, slots=True)
class Graph:
    """Tiles and edges. `left_out`: tiles that are not drawn."""

    tiles: Sequence[Tile]
    edges: Sequence[Edge]
    width: int
    height: int
    left_out: int


def graph(workflow: Workflow, job: str) -> Graph | None:
    """Return the graph around a job; None for a job that has neither parents nor steps."""
    if len(workflow.members) < 2:
        return None
    alike = _alike(workflow, job)
    tile_of = {member.id: number for number, members in enumerate(alike) for member in members}
    links = {(tile_of[first], tile_of[second], kind) for first, second, kind in workflow.links}
    links = {link for link in links if link[0] != link[1]}
    columns = _columns(len(alike), links)
    drawn = _nearest(columns, links, tile_of.get(job, 0))
    corners = _corners(columns, links, drawn)
    tiles = [_tile(alike[number], job, *corners[number]) for number in sorted(corners, key=lambda at: corners[at])]
    edges = [
        Edge(_curve(corners[first], corners[second]), kind)
        for first, second, kind in sorted(links)
        if first in corners and second in corners
    ]
    right, bottom = (max(corner[axis] for corner in corners.values()) + TILE[axis] for axis in (0, 1))
    return Graph(tiles, edges, right + 2, bottom + 2, len(alike) - len(drawn))


def _alike(workflow: Workflow, job: str) -> list[list[Member]]:
    """Return the jobs, those together that have the same task, group, parents and next steps."""
    around: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for first, second, _ in workflow.links:
        around[first].add(("next", second))
        around[second].add(("parent", first))
    by_kind: dict[object, list[Member]] = defaultdict(list)
    for member in workflow.members.values():
        by_kind[member.name, member.group, frozenset(around[member.id])].append(member)
    alike: list[list[Member]] = []
    for members in by_kind.values():
        alone = [member for member in members if member.id == job or len(members) <= FEW]
        rest = [member for member in members if member not in alone]
        alike += [*([member] for member in alone), *([rest] if rest else [])]
    return alike


def _columns(number: int, links: Iterable[tuple[int, int, Link]]) -> list[int]:
    """Return the column of each tile: behind all tiles that lead to it. A circle ends where it began."""
    before, after = [0] * number, defaultdict(set)
    for first, second in {link[:2] for link in links}:
        after[first].add(second)
        before[second] += 1
    columns, free = [0] * number, [tile for tile in range(number) if not before[tile]]
    while free:
        tile = free.pop()
        for second in after[tile]:
            columns[second] = max(columns[second], columns[tile] + 1)
            before[second] -= 1
            if not before[second]:
                free.append(second)
    return columns


def _nearest(columns: Sequence[int], links: Iterable[tuple[int, int, Link]], current: int) -> set[int]:
    """Return the tiles to draw: all of them, or those that the fewest links lead to from the job of the page."""
    beside: dict[int, set[int]] = defaultdict(set)
    for first, second, _ in links:
        beside[first].add(second)
        beside[second].add(first)
    seen, queue = {current: None}, [current]
    for tile in queue:
        fresh = sorted(beside[tile] - seen.keys())
        seen.update(dict.fromkeys(fresh))
        queue += fresh
    return set([*seen, *(tile for tile in range(len(columns)) if tile not in seen)][:MAX_TILES])


def _corners(
    columns: Sequence[int], links: Iterable[tuple[int, int, Link]], drawn: Iterable[int]
) -> dict[int, tuple[int, int]]:
    """Return the left upper corner of each drawn tile. A tile stands near those that lead to it."""
    parents: dict[int, list[int]] = defaultdict(list)
    for first, second, _ in links:
        parents[second].append(first)
    by_column: dict[int, list[int]] = defaultdict(list)
    for tile in sorted(drawn):
        by_column[columns[tile]].append(tile)
    corners: dict[int, tuple[int, int]] = {}
    for number, column in enumerate(sorted(by_column)):
        heights = {
            tile: _height([corners[parent] for parent in parents[tile] if parent in corners])
            for tile in by_column[column]
        }
        for row, tile in enumerate(sorted(heights, key=lambda tile: (heights[tile], tile))):
            corners[tile] = (1 + number * (TILE[0] + ROOM[0]), 1 + row * (TILE[1] + ROOM[1]))
    return corners


def _height(parents: Sequence[tuple[int, int]]) -> float:
    """Return the middle of the corners of a tile's parents; a tile without any comes last."""
    return sum(y for _, y in parents) / len(parents) if parents else float("inf")


def _tile(members: Sequence[Member], job: str, x: int, y: int) -> Tile:
    first = members[0]
    states = Counter(member.state or AHEAD for member in members)
    current = any(member.id == job for member in members)
    return Tile(first.id, first.name, states.most_common(), len(members), first.group, current, x, y)


def _curve(first: tuple[int, int], second: tuple[int, int]) -> str:
    """Return the path from the right side of a tile to the left side of another one."""
    x, y = first[0] + TILE[0], first[1] + TILE[1] // 2
    to_x, to_y = second[0], second[1] + TILE[1] // 2
    bend = ROOM[0] // 2
    return f"M{x} {y}C{x + bend} {y} {to_x - bend} {to_y} {to_x} {to_y}"
