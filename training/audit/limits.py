"""The thresholds of the detectors. Why these numbers: docs/audit.md, which shows the measurement.

A test text's length is counted in words, two CJK characters for one.
"""

from __future__ import annotations

import numpy as np

DETECTORS = (
    "exact",
    "near_duplicate",
    "containment_8",
    "containment_13",
    "containment_5",
    "containment_cjk_5",
    "source_id",
)
JACCARD_LIMIT = 0.8
SHINGLE = 5
SIZES = (5, 8, 13)  # of the n-grams looked up

# What a test text is, as `fields.Field` tells it. A whole row counts as asking.
ASKING, TELLING, LISTED = range(3)
# Length from which equality is a leak ("yes", "All of the above." and the like are not), and standing inside another.
MIN_EXACT = (4, 8, 30)
MIN_INSIDE = (6, 10, 30)
MIN_GRAMS = 3  # of 8 and 13 words
WHOLE_BELOW = (
    16  # a text of fewer words or CJK characters is found inside another only where all of it stands there
)
LONG = 40  # length from which runs of 8 and 13 words are counted

# Share of a text's n-grams in one training row that makes it a leak: of a whole row, a question or a long text, and
# (STRICT) of an answer or option shorter than STRICT_BELOW.
SHARES = {"words 5": 0.58, "words 8": 0.5, "words 13": 0.5, "cjk 5": 0.55}
STRICT = {"words 5": 0.85, "words 8": 0.7, "words 13": 0.7, "cjk 5": 0.85}
STRICT_BELOW = 100

PROPOSED = 0.25
RARE = 10  # an n-gram of more test texts than this is boilerplate: it says nothing about which one was copied
LOOKED_UP = 100  # 5-grams of more test texts than this do not even propose near duplicates
# A phrase: more than COMMON_ROWS different training rows hold it in part, none of them COMMON_SCORE of it.
COMMON_ROWS = 10
COMMON_SCORE = 0.9
# A template: a field equal in more than this many rows of a test file, and in more than this share of them.
FIELD_ROWS = 5
FIELD_SHARE = 0.01
LISTED_ROWS = 20  # test rows named for one training row and detector
NEVER = np.int32(2**31 - 1)


def length(words: int, cjk: int) -> float:
    """Words, two CJK characters counted as one."""
    return words - cjk / 2


def needed(
    n: int,
    words: np.ndarray,
    lengths: np.ndarray,
    cjk: np.ndarray,
    kinds: np.ndarray,
    sizes: np.ndarray,
    total: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(rare, all) n-grams of each test text of which one training row must hold as many; NEVER where n does not apply.

    The first number suffices. The second counts the common ones too, and is asked where a row holds PROPOSED of the
    rare ones: an edit of a text that is half boilerplate may have hit the other half.

    Args:
        n: 5, 8 or 13.
        words: of each text, CJK characters counted one by one.
        lengths: the same as `length` counts it.
        cjk: whether most of its words are CJK characters.
        kinds: ASKING, TELLING or LISTED.
        sizes: its number of distinct rare n-grams.
        total: the same with the common ones; where these are more than half, every rare one must be found.
    """
    strict = (kinds != ASKING) & (lengths < STRICT_BELOW)

    def share(name: str) -> np.ndarray:
        return np.where(strict, STRICT[name], SHARES[name])

    whole = (words < WHOLE_BELOW) | (2 * sizes < total)
    if n == SHINGLE:
        shares = np.where(cjk, share("cjk 5"), share("words 5"))
        possible = (lengths >= np.array(MIN_INSIDE)[kinds]) & (sizes >= 1)
    else:
        shares = share(f"words {n}")
        possible = ~cjk & (lengths >= LONG) & (sizes >= MIN_GRAMS)
    shares = np.where(whole, 1.0, shares)
    wanted = np.maximum(np.ceil(shares * sizes - 1e-9), 1)
    overall = np.where(
        words < WHOLE_BELOW, NEVER, np.ceil(np.where(cjk, share("cjk 5"), share("words 5")) * total - 1e-9)
    )
    possible_overall = possible & (n == SHINGLE) & (sizes >= MIN_GRAMS)
    return (
        np.where(possible, wanted, NEVER).astype(np.int32),
        np.where(possible_overall, overall, NEVER).astype(np.int32),
    )
