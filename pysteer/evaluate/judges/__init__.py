"""Judges and rewards; `pysteer.judge` has their interfaces.

| spec | judge |
|---|---|
| `refusal` | built in: explicit refusals and safe redirections are safe, all else is unsafe |
| `guard:PATH.gguf` | a guard model, run by pysteer's engine; `#FORMAT` appended names its format |
| `openai:URL#MODEL` | a model behind an OpenAI-compatible endpoint |
| `python:MODULE:FUNCTION` | a function of prompt and answer |

The last two can be rewards as well: they return a number, or several with names.
"""

from pysteer.evaluate.judges.functions import CallableJudge, CallableReward
from pysteer.evaluate.judges.refusal import RefusalJudge
from pysteer.evaluate.judges.registry import JUDGE_SPECS, REWARD_SPECS, open_judge, open_reward

__all__ = [
    "JUDGE_SPECS",
    "REWARD_SPECS",
    "CallableJudge",
    "CallableReward",
    "RefusalJudge",
    "open_judge",
    "open_reward",
]
