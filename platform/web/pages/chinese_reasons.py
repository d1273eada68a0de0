"""Reasons to wait in Chinese sentences, made from the same explanation as the English ones.

`console.render` and `console.wording` have the English sentences. Each sentence there has its like here, with the same
values. Commands, names and conditions stay as people write them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from celery_capacity.platform.console.estimates import DAY, span
from celery_capacity.platform.console.terminal import moment
from celery_capacity.platform.console.wording import LISTED, SHOWN_JOBS
from celery_capacity.routing.forecast.starts import EstimatedStart
from celery_capacity.routing.insert.key_lines import HeldBy
from celery_capacity.routing.inspect.explanation import Explanation
from celery_capacity.routing.model.amounts import (
    ALONE,
    CPUS,
    DEFAULT_QUEUE,
    GPUS,
    MEMORY,
    SLOTS,
    format_cpus,
    format_memory,
    is_label,
)
from celery_capacity.routing.model.expected import duration_text
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.missing import Missing, Room
from celery_capacity.routing.policy.pauses import Kind
from celery_capacity.routing.simulation.forecast import NoEstimate
from celery_capacity.routing.store.controls import Cordon, Pause

_Say = Callable[[Explanation], str]

WITH_ITS_CODE: Final = "启动带有其代码的工作节点：在 PLATFORM_IMPORTS 中写明模块，或用 celery -A APP worker 指定应用。"


def sentences(why: Explanation) -> list[str]:
    """Explain why a job waits: the reason, its place, what each worker lacks, and when it starts."""
    worded = [REASONS[why.why](why)]
    if why.place is not None:
        worded.append(f"它在相同请求的作业中排第 {why.place} 位；有 {why.position or 0} 个作业会先于它开始。")
    if why.large_enough is not None and why.why in (Reason.NO_ROOM, Reason.BEHIND_SHAPE):
        worded.append(f"存活的 {why.live_workers} 个工作节点中，有 {why.large_enough} 个足够大。")
    if not why.declared:
        worded.append("没有工作节点声明此任务，因此使用默认请求；认识此任务的工作节点可能声明另一个请求。")
    if len(why.over_quota) > 1:
        for line in why.over_quota:
            needed, left = (_amount(line.resource, max(0, amount)) for amount in (line.asked, line.free))
            worded.append(f"备选请求 {_request(line.request)} 需要 {needed}，配额剩余 {left}。")
    if why.why in LISTED and len(why.missing) > 1:
        worded += [f"{line.worker}：{_shortage(line)}。" for line in why.missing]
        if why.more_missing:
            worded.append(f"另有 {why.more_missing} 个工作节点也没有空位。")
    if why.unblocked_by is not None:
        worded.append(f"{why.unblocked_by.worker} 上的作业 {_listed(why.unblocked_by.jobs)} 结束后即有空位。")
    if why.estimate is not None:
        worded.append(_start(why.estimate))
    return worded


def _no_worker(why: Explanation) -> str:
    if why.worker:
        return f"足够大的工作节点（例如 {why.worker}）目前不准入作业。"
    if why.request.queue == DEFAULT_QUEUE:
        return "没有存活的工作节点准入作业。启动一个：celery -A platform worker"
    return f"服务队列 {why.request.queue} 的工作节点都不准入作业。"


def _no_queue(why: Explanation) -> str:
    queue = why.request.queue
    return f"没有工作节点服务队列 {queue}。启动一个：celery -A platform worker -Q {queue}"


def _unknown_resource(why: Explanation) -> str:
    setting = "PLATFORM_GPUS" if why.resource == GPUS else "PLATFORM_RESOURCES"
    return f"没有工作节点提供 {why.resource}，而它需要 {_asked(why)}。工作节点通过 {setting} 提供。"


def _no_room(why: Explanation) -> str:
    if why.resource == ALONE:
        return f"目前没有工作节点有空位：{why.worker} 留给必须独占运行的作业。"
    return f"目前没有工作节点有空位：它需要 {_asked(why)}，最接近的 {why.worker} 空闲 {_free(why)}。"


def _no_label(why: Explanation) -> str:
    return f"没有工作节点符合其要求：{why.where}。" + (f"工作节点现有 {why.labels}。" if why.labels else "")


def _alone(why: Explanation) -> str:
    cause = "它要求" if why.exclusive else "再丢失一次尝试它就会终止，因此必须"
    kept = f"{why.worker} 空闲之前不接受其他作业。" if why.worker else ""
    return f"{cause}独占一个工作节点，而适合它的工作节点都不空闲。{kept}"


def _no_time(why: Explanation) -> str:
    asked, left = duration_text(why.asked or 0), duration_text(why.free or 0)
    return f"适合它的工作节点都不会存活足够久：它可能运行 {asked}，存活最久的 {why.worker} 还剩 {left}。"


def _reserved(why: Explanation) -> str:
    whose = "排在它之前的作业" if why.tenant is None else f"优先的租户 {why.tenant} 的作业"
    return f"只有 {why.worker} 有空位，但已预留给{whose}。"


def _quota(why: Explanation) -> str:
    return f"租户 {why.tenant} 已达到 {why.resource} 的配额：它需要 {_asked(why)}，剩余 {_free(why)}。"


def _paused(why: Explanation) -> str:
    pause = why.pause
    if pause is None:
        return "它已暂停。"
    part = {Kind.PLATFORM: "平台", Kind.QUEUE: "它的队列", Kind.TASK: "它的任务", Kind.TENANT: "它的租户"}
    option = f" --{pause.scope.kind.value} {pause.scope.name}" if pause.scope.name else ""
    return f"{part[pause.scope.kind]}已暂停，{_since(pause)}。恢复：celery -A platform resume{option}"


def _cordoned(why: Explanation) -> str:
    cordon = why.cordon
    if cordon is None:
        return f"只有 {why.worker} 有空位，但它已隔离。"
    status = "正在排空" if cordon.drains else "已隔离"
    use = f"恢复使用：celery -A platform uncordon {why.worker}"
    return f"只有 {why.worker} 有空位，但它{status}，{_since(cordon)}。{use}"


def _since(order: Pause | Cordon) -> str:
    return f"{moment(order.since)} 起，由 {order.by} 操作" + (f"（{order.reason}）" if order.reason else "")


def _key(key: HeldBy | None) -> str:
    if key is None:
        return "它的某个键的限制使其等待。"
    behind = f"它在限制相同的等待作业中排第 {key.place_in_line:,} 位。"
    if key.limit is None or key.holding < key.limit:
        if not key.rate:
            return f"它的键 {key.key} 有空位，即将开始。{behind}"
        next_at = f"，下一次在 {moment(key.next_at)}" if key.next_at is not None else ""
        return f"它的键 {key.key} 的速率为 {key.rate}{next_at}。{behind}"
    more = f" 等另外 {key.holding - len(key.holders):,} 个" if key.holding > len(key.holders) else ""
    return f"它的键 {key.key} 最多同时 {key.limit:,} 个作业，现由 {', '.join(key.holders)}{more} 占用。{behind}"


#: Sentence of each reason.
REASONS: Final[Mapping[Reason, _Say]] = {
    Reason.NO_WORKER: _no_worker,
    Reason.NO_TASK: lambda why: f"没有存活的工作节点认识此任务。{WITH_ITS_CODE}",
    Reason.NO_QUEUE: _no_queue,
    Reason.UNKNOWN_RESOURCE: _unknown_resource,
    Reason.TOO_LARGE: lambda why: (
        f"对所有工作节点都太大：它需要 {_asked(why)}，最接近的 {why.worker} 空闲时也只有 {_free(why)}。"
    ),
    Reason.NO_ROOM: _no_room,
    Reason.NO_LABEL: _no_label,
    Reason.ALONE: _alone,
    Reason.NO_TIME: _no_time,
    Reason.RESERVED: _reserved,
    Reason.BEHIND_SHAPE: lambda why: "有空位，但相同请求的作业排在它之前。",
    Reason.ABOUT_TO_START: lambda why: f"{why.worker or '某个工作节点'} 有空位：它即将开始。",
    Reason.TENANT_QUOTA: _quota,
    Reason.TENANT_SHARE: lambda why: f"目前没有工作节点有空位，而租户 {why.tenant} 离其份额更远，因此优先。",
    Reason.PAUSED: _paused,
    Reason.CORDONED: _cordoned,
    Reason.SCHEDULED: lambda why: f"它在 {moment(why.due_at)} 之前不得开始。",
    Reason.NEEDS_JOBS: lambda why: f"它等待这些作业成功：{', '.join(why.needs)}。",
    Reason.RATE_LIMIT: lambda why: f"其任务在整个集群的速率限制为 {why.rate}，有其他作业排在它之前。",
    Reason.KEY_LIMIT: lambda why: _key(why.key),
    Reason.ON_ITS_WAY: lambda why: "它已保存，正在送往账本；发送者遗留的作业由清扫任务送达。",
    Reason.LEDGER_CLOSED: lambda why: "账本未就绪：重建完成之前不准入作业。",
    Reason.LEDGER_UNREACHABLE: lambda why: "Redis 无响应，因此不准入作业。",
    Reason.LEDGER_STANDS_BACK: lambda why: "由 Postgres 代替账本准入：工作节点自行领取适合的作业。",
    Reason.REPLACED: lambda why: "它已被另一个任务替换，并随其结束而结束。",
    Reason.RUNS: lambda why: f"它不在等待：它在 {why.worker} 上，状态为 {why.state.value}。",
    Reason.ENDED: lambda why: f"它不在等待：状态为 {why.state.value}。",
}

_WHY_NOT: Final = {
    NoEstimate.UNKNOWN_RUN_TIMES: "无法估计其开始时间：排在它之前的作业的运行时间未知。"
    "请为它们指定 `expected`，或设置 PLATFORM_LEARN_RUN_TIMES。",
    NoEstimate.NEVER_FITS: "无法估计其开始时间：即使之前的作业全部结束，也没有工作节点能接受它。",
    NoEstimate.TOO_FAR: "无法估计其开始时间：排在它之前的作业很多，其中能开始的太少。",
    NoEstimate.TENANTS: "无法估计其开始时间：多个租户共享工作节点，等待的作业太多。",
}


def _start(estimate: EstimatedStart) -> str:
    if estimate.at is None or estimate.seconds is None:
        return _WHY_NOT[estimate.why_not] if estimate.why_not is not None else ""
    clock = estimate.at.astimezone().strftime("%H:%M:%S" if estimate.seconds < DAY else "%Y-%m-%d %H:%M")
    words = f"预计约 {clock} 开始（{span(estimate.seconds)} 后）"
    if estimate.extrapolated:
        words += f"，按其之前前 {estimate.simulated:,} 个作业的速度推算"
    if estimate.without_reservations:
        words += "，因集群很大，估计时未计入预留"
    if estimate.errors:
        words += f"；此类估计的误差中位数为 {span(estimate.errors.median)}，九成不超过 {span(estimate.errors.p90)}"
    return f"{words}。"


def _shortage(line: Missing) -> str:
    if not line.admits:
        return "目前不准入作业"
    if line.alone:
        return "那里有作业必须独占运行"
    short = [_room(room) for room in line.rooms if not room.enough]
    enough = [_title(room.resource) for room in line.rooms if room.enough and room.resource != SLOTS]
    return "，".join([*short, *([f"{'、'.join(enough)} 足够"] if enough else [])])


def _room(room: Room) -> str:
    if not room.total:
        return f"没有 {_title(room.resource)}"
    return f"{_amount(room.resource, room.total)} 中空闲 {_number(room.resource, max(0, room.free))}"


def _listed(jobs: Sequence[str]) -> str:
    shown = "、".join(jobs[:SHOWN_JOBS])
    return f"{shown} 等另外 {len(jobs) - SHOWN_JOBS} 个" if len(jobs) > SHOWN_JOBS else shown


def _asked(why: Explanation) -> str:
    return _amount(why.resource, why.asked)


def _free(why: Explanation) -> str:
    return _amount(why.resource, max(0, why.free or 0))


def _request(request: Request) -> str:
    named = [
        (name, amount)
        for name, amount in request.amounts
        if not (name in (ALONE, CPUS) or is_label(name)) and (name != SLOTS or amount > 1)
    ]
    return "、".join(_amount(*part) for part in [(CPUS, request.get(CPUS)), *named])


def _amount(resource: str | None, amount: int | None) -> str:
    """Return an amount in words: "4 CPU", "2 GiB 内存", "1 GPU"; a named resource has its own name."""
    return "" if resource is None or amount is None else f"{_number(resource, amount)} {_title(resource)}"


def _number(resource: str, amount: int) -> str:
    if resource == CPUS:
        return format_cpus(amount)
    return format_memory(amount) if resource == MEMORY else str(amount)


def _title(resource: str) -> str:
    return {CPUS: "CPU", MEMORY: "内存", SLOTS: "槽位", GPUS: "GPU"}.get(resource, resource)
