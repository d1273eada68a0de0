"""The languages of the pages: English and Chinese, by a cookie of the switch, else by what the browser prefers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from starlette.requests import Request

from celery_capacity.platform.console import wording
from celery_capacity.platform.web.pages import chinese_reasons
from celery_capacity.platform.web.pages.action_texts import ACTION_TEXTS
from celery_capacity.routing.inspect.explanation import Explanation
from celery_capacity.routing.model.reasons import Reason

COOKIE: Final = "capacity_language"
#: The languages, by their codes, each by its own name.
LANGUAGES: Final = {"en": "English", "zh": "中文"}

#: Chinese by English. A text that is missing here stays English; a test holds the templates to this table.
CHINESE: Final = ACTION_TEXTS | {
    "HTTP API": "HTTP 接口",
    "All paths below /api/v1, made from the document that programs read:": (
        "/api/v1 下的全部路径，由供程序读取的文档生成："
    ),
    "In the examples, TOKEN is PLATFORM_TOKEN for the role operator, or PLATFORM_VIEWER_TOKEN for the role viewer."
    " Words in capitals stand for values of yours.": (
        "示例中，操作员的 TOKEN 为 PLATFORM_TOKEN，只读者的为 PLATFORM_VIEWER_TOKEN。大写单词请换成您自己的值。"
    ),
    "Paths": "路径",
    "Read": "读取",
    "Act": "操作",
    "Needs the role": "所需角色：",
    "viewer": "只读者",
    "operator": "操作员",
    "Needs no token.": "无需令牌。",
    "Parameters": "参数",
    "path": "路径",
    "query": "查询",
    "header": "请求头",
    "required": "必填",
    "Body": "请求体",
    "Answer": "响应",
    "Fields of the answer": "响应字段",
    "Errors, as application/problem+json:": "错误（application/problem+json）：",
    "Example": "示例",
    "Objects": "对象",
    "Cluster": "集群",
    "Waiting": "等待",
    "Jobs": "作业",
    "Tasks": "任务",
    "Job": "作业",
    "Skip to the content": "跳到正文",
    "Sections": "导航",
    "Language": "语言",
    "Log out": "退出",
    "Log in": "登录",
    "Token": "令牌",
    "The token is PLATFORM_TOKEN, or PLATFORM_VIEWER_TOKEN to look only. Without them, the file dashboard-token below"
    " PLATFORM_HOME has it.": (
        "令牌为 PLATFORM_TOKEN；仅查看时为 PLATFORM_VIEWER_TOKEN。"
        "未设置时，令牌在 PLATFORM_HOME 下的 dashboard-token 文件中。"
    ),
    "This is not the token.": "令牌不正确。",
    "Too many attempts. Wait a minute.": "尝试次数过多，请等待一分钟。",
    "live": "实时",
    "connecting": "正在连接",
    "interrupted": "已中断",
    "Postgres decides.": "由 Postgres 调度。",
    "Redis's ledger does not answer or is closed. Workers take jobs from Postgres, and the figures come from there.": (
        "Redis 账本无响应或已关闭。工作节点从 Postgres 领取作业，此页数据也来自 Postgres。"
    ),
    "The ledger in Redis decides.": "由 Redis 账本调度。",
    "Redis is short of memory.": "Redis 内存不足。",
    "Jobs that find no room stay in Postgres.": "没有空位的作业留在 Postgres 中。",
    "workers": "工作节点",
    "Workers": "工作节点",
    "Worker": "工作节点",
    "waiting jobs": "等待中的作业",
    "allocated": "已分配",
    "available": "可用",
    "of": "/",
    "Memory": "内存",
    "Slots": "槽位",
    "CPUs": "CPU",
    "Drift:": "差异：",
    "not reconciled yet": "尚未对账",
    "reconciled": "上次对账",
    "Stores are not compared while Postgres decides.": "由 Postgres 调度时不对账。",
    "Missing workers": "失联的工作节点",
    "They sent no heartbeat. What ran on a lost worker runs elsewhere.": "没有心跳。丢失节点上的作业已在别处运行。",
    "suspect": "疑似失联",
    "No worker is alive.": "没有存活的工作节点。",
    "The last hour": "最近一小时",
    "The last hour as a table": "最近一小时（表格）",
    "Allocated CPUs": "已分配 CPU",
    "Waiting jobs": "等待中的作业",
    "Jobs a second": "每秒作业数",
    "Wait in seconds": "等待秒数",
    "Started a second": "每秒开始",
    "Ended a second": "每秒结束",
    "Minute": "分钟",
    "ended": "已结束",
    "0 to": "0 至",
    "So many jobs ended that only the last minutes are shown.": "结束的作业太多，仅显示最近几分钟。",
    "No worker is like this.": "没有符合条件的工作节点。",
    "Show all": "显示全部",
    "Group by": "分组",
    "No groups": "不分组",
    "Status": "状态",
    "Size": "规格",
    "without": "没有",
    "more groups": "个更小的分组",
    "Groups of workers": "工作节点分组",
    "Start one:": "启动一个：",
    "heartbeat": "心跳",
    "ago": "前",
    "no heartbeat noted": "没有心跳记录",
    "ends in": "结束于",
    "jobs": "个作业",
    "Filter": "筛选",
    "Name": "名称",
    "Show": "显示",
    "More": "更多",
    "Older": "更早",
    "Newest": "最新",
    "Held back": "已暂停或隔离",
    "paused": "已暂停",
    "since": "自",
    "by": "由",
    "ready": "就绪",
    "cordoned": "已隔离",
    "draining": "正在排空",
    "late": "心跳迟到",
    "Nothing waits.": "没有等待中的作业。",
    "Every accepted job has started.": "所有已接受的作业都已开始。",
    "Can never run": "永远无法运行",
    "No worker could take these, not even an empty one.": "没有工作节点能运行它们，即使完全空闲。",
    "Waits for room": "等待资源",
    "Task": "任务",
    "Request": "请求",
    "or": "或",
    "Queue": "队列",
    "Priority": "优先级",
    "Tenant": "租户",
    "Where": "位置要求",
    "Oldest": "最久",
    "Reason": "原因",
    "First job": "首个作业",
    "Before it": "之前",
    "Starts about": "预计开始",
    "State": "状态",
    "Submitted": "提交",
    "Waited": "等待时长",
    "Ran": "运行时长",
    "Error": "错误",
    "Any state": "任意状态",
    "Text": "文本",
    "No job is like this.": "没有符合条件的作业。",
    "Why it waits": "为什么等待",
    "Timeline": "时间线",
    "submitted": "已提交",
    "due": "应开始",
    "admitted": "已准入",
    "started": "已开始",
    "finished": "已结束",
    "waiting": "等待",
    "starting": "正在启动",
    "running": "运行",
    "Attempts": "尝试",
    "Attempt": "尝试",
    "Outcome": "结果",
    "Arguments": "参数",
    "Keyword arguments": "关键字参数",
    "Result": "结果",
    "Log": "日志",
    "Sender": "发送者",
    "Progress": "进度",
    "Root": "根作业",
    "Parent": "父作业",
    "Retry of": "重试自",
    "Retried as": "重试为",
    "open": "进行中",
    "hidden from this role": "此角色无权查看",
    "the default: no worker declared this task": "默认值：没有工作节点声明此任务",
    "Expected": "预计时长",
    "Failed": "失败",
    "Failure rate": "失败率",
    "Run p50": "运行 p50",
    "Run p95": "运行 p95",
    "Wait p50": "等待 p50",
    "Wait p95": "等待 p95",
    "Trend of run times": "运行时间趋势",
    "Workflow": "工作流",
    "not submitted": "尚未提交",
    "Dashed: to the body of a chord, or to a replacement.": "虚线：指向 chord 的主体或替换作业。",
    "more are not drawn.": "个未绘出。",
    "The workflow has more jobs than are read.": "工作流的作业太多，未全部读取。",
    "All jobs of the workflow": "工作流的所有作业",
    "Repeated": "重试历史",
    "archived": "已归档",
    "Runs": "运行",
    "Who ran where": "谁在哪里运行",
    "Stretch": "时段",
    "Earlier": "更早",
    "Later": "更晚",
    "Zoom in": "放大",
    "Zoom out": "缩小",
    "Now": "现在",
    "free": "空闲",
    "missing": "缺少",
    "Chart of runs: a row for each worker, as high as its CPUs": "运行图：每个工作节点一行，行高为其 CPU 数",
    "Click or press Enter to see what waited.": "点击或按回车查看当时等待的作业。",
    "The runs could not be read.": "无法读取运行记录。",
    "There are more runs than are drawn: the earliest are left out.": "运行太多，未绘出最早的部分。",
    "Drag or use the arrow keys to move, Ctrl and wheel or + and − to zoom.": (
        "拖动或用方向键移动，Ctrl 加滚轮或 + 和 − 缩放。"
    ),
    "Press Enter on a bar for its job, on a hole for what waited then.": (
        "在条上按回车打开作业，在空处按回车查看当时等待的作业。"
    ),
    "The newest runs as a table": "最近的运行（表格）",
    "Nothing ran in this stretch.": "此时段没有运行。",
    "The worker did not live then.": "工作节点当时没有运行。",
    "Free then:": "当时空闲：",
    "Waited then:": "当时等待：",
    "No job waited.": "没有作业等待。",
    "It had room here. Postgres does not keep what held it back: its turn, a reservation, a pause or a cordon.": (
        "此处当时有空位。Postgres 不保存其他原因：排队次序、预留、暂停或隔离。"
    ),
    "Figures over the newest jobs:": "最近作业的统计，数量：",
    "No job yet.": "还没有作业。",
    "accepted": "已接受",
    "scheduled": "已排期",
    "replaced": "已替换",
    "succeeded": "成功",
    "failed": "失败",
    "cancelled": "已取消",
    "expired": "已过期",
    "lost": "丢失",
    "retried": "已重试",
    "requeued": "已重新排队",
    "handed_back": "已交还",
    "taken_back": "已收回",
    "Not found": "未找到",
    "Back to the cluster": "返回集群",
    "Something is wrong": "出现问题",
    "unlisted": "未列出",
    "no job": "无作业",
}

#: Reasons to wait, in short.
REASONS: Final = {
    Reason.NO_WORKER: ("No live worker", "没有可用的工作节点"),
    Reason.NO_TASK: ("No worker knows the task", "没有工作节点认识此任务"),
    Reason.NO_QUEUE: ("No worker serves the queue", "没有工作节点服务此队列"),
    Reason.UNKNOWN_RESOURCE: ("No worker has the resource", "没有工作节点提供此资源"),
    Reason.TOO_LARGE: ("Too large for every worker", "对所有工作节点都太大"),
    Reason.NO_ROOM: ("No room now", "暂无空位"),
    Reason.CORDONED: ("The worker is cordoned", "工作节点已隔离"),
    Reason.NO_TIME: ("No worker lives long enough", "没有工作节点存活足够久"),
    Reason.NO_LABEL: ("No worker has the labels", "没有工作节点符合标签"),
    Reason.RESERVED: ("The room is reserved", "空位已预留"),
    Reason.BEHIND_SHAPE: ("Behind equal jobs", "排在相同请求之后"),
    Reason.ALONE: ("Must run alone", "必须独占运行"),
    Reason.ABOUT_TO_START: ("About to start", "即将开始"),
    Reason.TENANT_QUOTA: ("The tenant's quota is reached", "租户配额已用尽"),
    Reason.TENANT_SHARE: ("Another tenant comes first", "其他租户优先"),
    Reason.PAUSED: ("Paused", "已暂停"),
    Reason.SCHEDULED: ("Not due yet", "未到时间"),
    Reason.NEEDS_JOBS: ("Waits for other jobs", "等待其他作业"),
    Reason.RATE_LIMIT: ("Rate limit", "速率限制"),
    Reason.KEY_LIMIT: ("Limit of its key", "键的限制"),
    Reason.ON_ITS_WAY: ("On its way to the ledger", "正在送往账本"),
    Reason.LEDGER_CLOSED: ("The ledger is cold", "账本未就绪"),
    Reason.LEDGER_UNREACHABLE: ("Redis does not answer", "Redis 无响应"),
    Reason.LEDGER_STANDS_BACK: ("Postgres admits", "由 Postgres 准入"),
    Reason.REPLACED: ("Replaced by another task", "已被其他任务替换"),
}


def language_of(request: Request) -> str:
    """Return the code of the language of a request."""
    chosen = request.cookies.get(COOKIE)
    if chosen in LANGUAGES:
        return chosen
    weighted = []
    for number, part in enumerate(request.headers.get("accept-language", "").split(",")[:20]):
        name, _, quality = part.partition(";q=")
        code = name.strip().lower().partition("-")[0]
        if code in LANGUAGES:
            weighted.append((-_quality(quality), number, code))
    return min(weighted)[2] if weighted else "en"


def _quality(text: str) -> float:
    try:
        return float(text) if text.strip() else 1.0
    except ValueError:
        return 0.0


def translator(language: str) -> Callable[[str], str]:
    """Return the function that gives an English text in the language."""
    return (lambda text: CHINESE.get(text, text)) if language == "zh" else (lambda text: text)


def reason_words(reason: str | None, language: str) -> str:
    """Return a reason to wait in short; "" for none."""
    words = {kind.value: texts for kind, texts in REASONS.items()}.get(reason or "")
    return reason or "" if words is None else words[language == "zh"]


def reason_sentences(why: Explanation | None, language: str) -> list[str]:
    """Return the reason of a job in sentences; [] for a job that does not wait, or without an explanation."""
    if why is None or not why.waits:
        return []
    return chinese_reasons.sentences(why) if language == "zh" else wording.sentences(why)


def paragraph(sentences: Sequence[str]) -> str:
    """Join sentences. A space follows a sentence, unless it ends with a full stop of Chinese, which has its own."""
    joined = "".join(sentence if sentence.endswith("。") else f"{sentence} " for sentence in sentences)
    return joined.rstrip()
