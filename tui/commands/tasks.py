"""`medmerge tasks`: the presets there are, one of them as YAML, the JSON Schemas, and tasks read to see if they fit.

`check` reads a task file or all tasks of a config, without a model: how many rows, the first prompt, the answers.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.errors import BadInputError
from tui.commands.common import Commands, existing_path, print_json, table, workspace_of
from tui.safe_text import plain

if TYPE_CHECKING:
    from engine.evaluate.data import Sample
    from engine.evaluate.tasks import Task

SHOWN = 1500  # characters of a prompt
Json = dict[str, Any]


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "tasks",
        "task presets, and what a task or config really asks",
        "Lists the presets; prints one as YAML, to be used or changed; reads task files and configs and shows the\n"
        "rows, the first prompt as built and the answers (exit 2 when something is wrong).",
        "  medmerge tasks\n"
        "  medmerge tasks medqa > my-task.yaml\n"
        "  medmerge tasks check my-task.yaml --data questions.csv\n"
        "  medmerge tasks check sweep.yaml\n"
        "  medmerge tasks --schema task > task.schema.json",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a preset; or `check` and task files, presets or configs"
    )
    parser.add_argument("--data", metavar="FILE", help="with check: the data of a task that names none")
    parser.add_argument(
        "--schema", choices=("eval", "task"), help="print the JSON Schema of configs or of task files"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    names = list(args.names)
    if args.schema:
        return _schema(args, names)
    if names[:1] == ["check"]:
        return _check(args, names[1:])
    if args.data:
        raise BadInputError("--data goes with check", "medmerge tasks check TASK --data FILE")
    if not names:
        return _list(args)
    if len(names) > 1:
        raise BadInputError(
            f"{len(names)} presets are named, and one is printed", "medmerge tasks check NAME NAME ..."
        )
    from engine.evaluate.tasks import preset_path

    text = preset_path(names[0]).read_text(encoding="utf-8")
    if args.json:
        print_json({"name": names[0], "yaml": text})
    else:
        print(text, end="")
    return 0


def _schema(args: argparse.Namespace, names: list[str]) -> int:
    if names or args.data:
        raise BadInputError("--schema stands alone", "medmerge tasks --schema task")
    from engine.evaluate.schema import schema

    print_json(schema(args.schema))
    return 0


def _list(args: argparse.Namespace) -> int:
    from engine.evaluate.tasks import PRESETS
    from engine.evaluate.tasks.parse import preset_values

    found = []
    for name in PRESETS:
        values = preset_values(name)
        keys = ("kind", "scoring", "about", "origin", "licence")
        found.append(
            {"name": name, **{key: values.get(key, "") for key in keys}, "needs_data": "data" not in values}
        )
    if args.json:
        print_json({"presets": found})
        return 0
    rows = []
    for row in found:
        needs = "a file" if row["needs_data"] else ""
        rows.append([row["name"], _kind(row["kind"], row["scoring"]), needs, row["about"]])
    print(table(["preset", "kind", "needs", "what"], rows))
    print("\nin a config:  tasks: [{use: medqa, data: phrases_no_exclude_test.jsonl, limit: 200}, xstest]")
    return 0


def _kind(kind: str, scoring: str) -> str:
    return f"{kind} ({scoring})" if scoring else kind


def _check(args: argparse.Namespace, names: list[str]) -> int:
    if not names:
        raise BadInputError(
            "check what?", "name task files, presets or configs: medmerge tasks check sweep.yaml"
        )
    if args.data and len(names) > 1:
        raise BadInputError(f"--data is for one task, and {len(names)} are named", "check them one by one")
    found = [(name, task) for name in names for task in _tasks_of(args, name)]
    facts = [{"from": name, **facts_of(task)} for name, task in found]
    if args.json:
        print_json({"tasks": facts})
    else:
        print("\n\n".join(_words(fact) for fact in facts))
    return 0


def _tasks_of(args: argparse.Namespace, name: str) -> tuple[Task, ...]:
    """The tasks of a config, or the one of a task file or preset."""
    from engine.evaluate.config import parse_config
    from engine.evaluate.search.config import load_search
    from engine.evaluate.tasks import PRESETS, load_task
    from engine.evaluate.values import read_yaml

    workspace = workspace_of(args)
    changes = {"data": str(existing_path(args.data, workspace, "data file"))} if args.data else {}
    if name in PRESETS:
        return (load_task(name, [workspace.root], **changes),)
    path = existing_path(name, workspace, "task or config")
    if path.is_dir():
        raise BadInputError(f"{path} is a folder", "name a task file or a config")
    raw = read_yaml(path)
    if not isinstance(raw, Mapping) or "tasks" not in raw:
        if path.suffix.lower() not in (".yaml", ".yml"):
            raise BadInputError(f"{path} is neither a task file nor a config", "both are .yaml files")
        return (load_task(path, [workspace.root], **changes),)
    if changes:
        raise BadInputError(
            f"--data is for one task, and {name} is a config", "write the data into the config"
        )
    if "search" in raw:
        return load_search(path, workspace.root).evaluation.tasks
    return parse_config(raw, str(path), [workspace.root, path.parent]).tasks


def facts_of(task: Task) -> Json:
    """What reading a task gives, as JSON values."""
    from engine.evaluate.data import read_data

    data = read_data(task)
    samples = data.samples
    facts: Json = {
        "name": task.name,
        "kind": task.kind,
        "data": str(task.data),
        "rows": data.rows,
        "samples": len(samples),
        "notes": data.notes,
        "half": task.half,
        "first": {"id": samples[0].id, "prompt": prompt_of(task, samples[0]), "system": task.system},
        "prompt_characters": _spread([len(prompt_of(task, sample)) for sample in samples]),
    }
    if task.kind == "multiple_choice":
        from engine.evaluate.choice import LETTERS

        answers = Counter(LETTERS[sample.answer] for sample in samples)
        facts |= {
            "scoring": task.scoring,
            "options": {
                str(n): count for n, count in sorted(Counter(len(s.options) for s in samples).items())
            },
            "answers": dict(sorted(answers.items())),
            "majority": max(answers.values()) / len(samples),
        }
        facts["first"]["answer"] = samples[0].options[samples[0].answer]
    elif task.kind == "generation":
        facts["reference_characters"] = _spread([len(sample.reference) for sample in samples])
        facts["first"]["reference"] = samples[0].reference
    elif task.kind == "probes":
        kinds = Counter(f"{sample.category} ({sample.probe})" for sample in samples)
        facts["categories"] = dict(kinds.most_common())
    elif task.kind == "instructions":
        facts["instructions"] = dict(
            Counter(rule["id"] for s in samples for rule in s.instructions).most_common()
        )
    return facts


def prompt_of(task: Task, sample: Sample) -> str:
    """The words a model is asked, before a chat template (if any) goes around them."""
    if task.kind != "multiple_choice":
        return sample.prompt
    from engine.evaluate import choice

    if task.shuffle is not None:
        sample = choice.shuffled(sample, task.shuffle)
    if task.scoring == "generated":
        return choice.generated_prompt(sample, task.language, task.instruction)
    return choice.choice_prompt(sample, task.scoring, task.style, task.description)


def _spread(lengths: list[int]) -> Json:
    return {"least": min(lengths), "median": int(statistics.median(lengths)), "most": max(lengths)}


def _words(facts: Json) -> str:
    first = facts["first"]
    half = "" if facts["half"] == "all" else f" of the {facts['half']} half"
    lines = [
        f"{facts['name']} · {_kind(facts['kind'], facts.get('scoring', ''))} · {facts['data']}",
        f"  {facts['samples']:,} samples{half}, of {facts['rows']:,} rows in the file",
        *(f"  {note}" for note in facts["notes"]),
    ]
    if "answers" in facts:
        options = ", ".join(f"{n} in {count:,}" for n, count in facts["options"].items())
        answers = " ".join(f"{letter} {count:,}" for letter, count in facts["answers"].items())
        lines += [
            f"  options: {options}",
            f"  answers: {answers} · always the commonest: {100 * facts['majority']:.1f}%",
        ]
    for key, word in (("prompt_characters", "prompts"), ("reference_characters", "references")):
        if key in facts:
            lengths = facts[key]
            lines.append(
                f"  {word}: {lengths['median']:,} characters (median), {lengths['least']:,} to {lengths['most']:,}"
            )
    for key in ("categories", "instructions"):
        if key in facts:
            lines.append(f"  {key}: " + ", ".join(f"{name} {count:,}" for name, count in facts[key].items()))
    lines.append(f"  the first, {first['id']}:")
    if first["system"]:
        lines += ["    (system)", *_indented(first["system"]), "    (user)"]
    lines += _indented(first["prompt"])
    for key in ("answer", "reference"):
        if key in first:
            lines += [f"  its {key}:", *_indented(first[key])]
    return plain("\n".join(lines), lines=True)


def _indented(text: str) -> list[str]:
    cut = text[:SHOWN] + f" … ({len(text) - SHOWN:,} more characters)" if len(text) > SHOWN else text
    return [f"    {line}" for line in cut.split("\n")]
