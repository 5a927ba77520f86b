"""Answers that begin like a reasoning trace without tags: "Okay, so the user is asking ...", "嗯，用户问的是 ...".

Called by `think.split_think`, which flags such answers and takes nothing away: where the reasoning ends and the
answer begins cannot be told from the text. What gives a trace away is its first clause: it speaks *about* the user
or the question, or it announces thinking. Many good answers begin with the same words ("First, take your
temperature"), so words alone never decide, and a clause that only announces thinking does not count when it speaks
*to* the user ("Let me break this down for you"). A trace that goes straight to the matter ("The patient has ...")
cannot be told from an answer and is not found.
"""

from __future__ import annotations

import re

_BEGINNING = 400  # characters looked at


def _any(*words: str) -> str:
    """An alternation; a blank stands for one or more."""
    return "(?:" + "|".join(word for line in words for word in line.split("/")).replace(" ", r"\s+") + ")"


# English: openers that say nothing yet, then what gives a trace away.
_LEAD = (
    "(?:"
    + _any("okay/ok/alright/all right/right/hm+/well/so/now/first(?:ly)?(?: off)?/oh/um+/uh/yeah")
    + r"\b[\s,.…!:-]*){0,4}"
)
_USER = r"(?:the|this)\s+user(?:'s)?\s+(?!" + _any(
    "manual/guide/interface/experience/account/name/id/should/must/can/needs? to"
) + r"\b)\w"  # fmt: skip
_QUESTION = (
    _any("the/this")
    + r"\s+"
    + _any("question/prompt/query/stem")
    + r"\s+"
    + _any("is asking/asks?/is about/says/states/wants/mentions/requires")
)
_SITUATION = _any(
    r"this person (?:is asking|asks|wants|seems)",
    r"(?:we|i)(?:'re|'m|'ve been| are| am| have been) (?:being )?(?:asked|tasked|given (?:an?|the|this))",
    r"(?:i|we)(?:'ve| have)(?: got)? (?:this|a|an) (?:\w+ ){0,2}?(?:question|problem|case|scenario|vignette)",
    r"(?:i'm|i am|\w+ is) trying to (?:figure|understand|recall|think|wrap|work|learn|remember)",
    r"here's (?:how i(?:'m|'ll| am| will)|my (?:plan|approach|thinking|thoughts?|reasoning))",
)
_MUSING = _any(
    r"(?:okay|ok|alright|so|hm+)[\s,.…]+(?:so[\s,]+)?i(?:'m| am) not (?:entirely |really )?sure",
    r"first(?:ly)?, i (?:recogni[sz]e|notice|see|know|observe|recall)",
    r"hm+[\s,.…]+i (?:think|remember|recall|wonder|should|need|know|believe)",
    r"hm+[\s,.…]+(?:okay|ok|so|wait|but)",
    r"wait, (?:the|so|but|that|is|no|maybe|actually|if|i|let|this)",
)
_HEADER = (
    r"\W*"
    + _any("thinking/thoughts?/reasoning/chain of thought/internal (?:monologue|reasoning)")
    + r"(?:\s+process)?\W{0,3}[:：]"
)
_OTHER_TAG = (
    r"<\|?(?:begin_of_)?" + _any("thinking/thoughts?/reasoning/scratchpad/analysis/reflection") + r"\|?>"
)
_ABOUT = re.compile(
    rf"{_LEAD}(?:{_USER}|(?:{_QUESTION}|{_SITUATION})\b)|{_MUSING}\b|{_HEADER}|{_OTHER_TAG}", re.IGNORECASE
)

# What one says to oneself before answering; "I need to ask / tell / stress ..." is said to the reader.
_THINKING = (
    "answer/figur/recall/remember/think/consider/determin/analy[sz]/identify/work out/work through/break/go through"
    "/go over/respond/address/output/evaluat/pick/choose/calculat/comput/parse/reason/review/solve/organi[sz]"
)
_SAYING = (
    "ask/know/tell/be/have/say/see/hear/inform/warn/emphasi[sz]e/stress/remind/refuse/decline/point/clarify/stop"
    "/note/mention/add/admit/disagree/apologi[sz]e/not/also/respectfully/politely"
)
_ANNOUNCED = re.compile(
    rf"{_LEAD}(?:to\s[^,.\n]{{3,80}},\s+)?"
    + _any(
        rf"i (?:need to|have to|must|should) (?!{_any(_SAYING)}\b)\w",
        r"i(?:'ll| will| want to) (?:first |start by |begin by )?" + _any(_THINKING),
        r"we (?:need(?: to)?|have to|should|must) "
        + _any(
            "answer/figure/determine which/pick/choose/select/find the/produce/output/respond/write/recall/parse"
        ),
        r"let me (?:first |start by |begin by |just |try to )*"
        + _any(_THINKING, r"see\b/look at/check/read/make sure/approach/draft/craft/rephrase/formulat"),
        r"let(?:'s| us) (?:start by )?"
        + _any(
            r"think/see\b/tackle/analy[sz]e/reason/work (?:through|this|out)/go through/figure/recall/parse"
        ),
        r"let(?:'s| us) (?:start by )?"
        + _any(
            r"evaluate/approach/comput/calculat/solve/break (?:this|it|that) down/(?:take a )?look at th(?:is|ese)\b"
        ),
    ),
    re.IGNORECASE,
)

# Chinese, in the same order.
_LEAD_ZH = "(?:(?:嗯+|唔+|呃|哦|好的|好吧|好|那么|那|首先|现在|所以)[，,。.、…！!：:\\s]*){0,3}"
_USER_ZH = "(?:这个|这位|该)?用户(?!须知|手册|体验|界面|协议|指南|名|们|应|可以|评价|[：:])"
_QUESTION_ZH = (
    "(?:这个|这道|本|该)?(?:问题|题目|题干|题)(?:问的?是|问|是关于|是在问|要求|让我|说|中?提到|给出|描述)"
)
_MUSING_ZH = "嗯+[，,…。\\s]*我(?:想|觉得|记得|得|先|应该|不太|有点|不确定|知道)|等等[，,]|等一下[，,]"
_HEADER_ZH = (
    "[\\s【\\[*#]*(?:思考|推理|思维)(?:过程|链)?[\\s】\\]*]*[:：\n]|[\\s*]*【(?:思考|推理)(?:过程)?】"
)
_ABOUT_ZH = re.compile(f"{_LEAD_ZH}(?:{_USER_ZH}|{_QUESTION_ZH})|{_MUSING_ZH}|{_HEADER_ZH}")

_THINKING_ZH = (
    "(?:想|看|回忆|分析|考虑|弄清|理清|搞清|明确|思考|梳理|理解|整理|回顾|推理|理一|捋|判断|按|一步)"
)
_ANNOUNCED_ZH = re.compile(
    f"{_LEAD_ZH}(?:"
    "我(?:现在|首先|先|还)*(?:需要|得|要|应该|必须)(?!提醒|强调|告诉|说明|声明|指出|澄清|知道|承认)"
    f"|我(?:现在|首先)?(?:先|来){_THINKING_ZH}"
    f"|我们(?:现在|首先|先|还)*(?:需要|得|要|应该|必须|来)(?:先|首先|仔细|好好|认真)*{_THINKING_ZH}"
    f"|让我们?(?:先|再|来|好好|仔细|一步一步|一步步|逐步|认真)*地?{_THINKING_ZH})"
)

_CLAUSE_END = re.compile(r"[.!?:\n。！？：]")
_TO_THE_USER = re.compile(r"\b(?:you|your|yours|you're)\b|[您你]|一起", re.IGNORECASE)
_APOSTROPHES = re.compile("[’‘‛`´]")


def reasons_openly(answer: str) -> bool:
    """Whether an answer without a trace begins like one. English and Chinese."""
    text = _APOSTROPHES.sub("'", answer.lstrip()[:_BEGINNING])
    if _ABOUT.match(text) or _ABOUT_ZH.match(text):
        return True
    announced = _ANNOUNCED.match(text) or _ANNOUNCED_ZH.match(text)
    if not announced:
        return False
    end = _CLAUSE_END.search(text, announced.end())
    return not _TO_THE_USER.search(text[: end.start() if end else len(text)])
