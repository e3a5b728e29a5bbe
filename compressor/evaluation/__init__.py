"""Scores of models: perplexity as in the papers, divergence from the original, lm-eval's tasks,
bytes and speed.

windows.py    perplexity and KL divergence over token windows, in one pass that can be interrupted
lmeval.py     tasks of the lm-evaluation-harness
speed.py      tokens a second on a GPU
candidate.py  one model to be scored: what it is by content, loaded only if something about it is
              not known yet
rounded.py    the baseline rounded to int4 or int3, in memory
run.py        all of it for many models, from the cache where it is known, in lm-eval's schema
served.py     perplexity of what a server says, beside that of the model
markdown.py   the table; plot.py the picture
"""

from compressor.evaluation.markdown import table
from compressor.evaluation.rounded import split_baselines
from compressor.evaluation.run import evaluate, evaluate_all
from compressor.evaluation.served import score
from compressor.evaluation.windows import DIVERGENCE, METRIC, perplexity

__all__ = [
    "DIVERGENCE",
    "METRIC",
    "evaluate",
    "evaluate_all",
    "perplexity",
    "score",
    "split_baselines",
    "table",
]
