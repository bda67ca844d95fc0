"""The model card of an exported classifier: README.md as the Hugging Face Hub reads it.

Every figure in it comes from evaluation.json, with its attack and radius beside it; what was not
measured is not there. The licence is the user's to choose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from reat_fast.cli.radius import fraction_text
from reat_fast.evaluation.attacks import threat_text
from reat_fast.reporting.run_record import PARTS
from reat_fast.reporting.tables import markdown, markdown_text, mean_text, sizes_of_parts

TAGS = ("adversarial-training", "adversarial-robustness", "long-tailed-recognition")


def model_card(name: str, description: dict[str, Any], repository: str | None = None) -> str:
    """Write the card of a classifier: YAML front matter, accuracies, how to load it.

    description: what reat_fast.export.describe returns. repository: OWNER/NAME, where it is known.
    """
    sections = [
        _front_matter(name, description),
        f"# {markdown_text(name)}\n\n{_summary(description)}",
        f"## Accuracy\n\n{_accuracy(description)}",
        f"## How to load it\n\n{_loading(repository)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(name: str, description: dict[str, Any]) -> str:
    # JSON strings are YAML strings, so whatever a name holds stays a string.
    lines = [
        "---",
        "# license: yours to choose; write its Hub identifier here",
        f"library_name: {description['library_name']}",
        "pipeline_tag: image-classification",
        "tags:",
        *(f"- {tag}" for tag in TAGS),
    ]
    evaluation = description["evaluation"]
    if evaluation is not None:
        dataset = json.dumps(evaluation["dataset"])
        lines += [
            "model-index:",
            f"- name: {json.dumps(name)}",
            "  results:",
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {dataset}",
            f"      type: {dataset}",
            "      split: test",
            "    metrics:",
        ]
        for title, value in _metrics(evaluation):
            lines += [
                "    - type: accuracy",
                f"      name: {json.dumps(title)}",
                f"      value: {value:.2f}",
            ]
    return "\n".join([*lines, "---"])


def _metrics(evaluation: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for attack, figures in evaluation["attacks"].items():
        for part in PARTS:
            if figures.get(part) is not None:
                yield f"{_title(attack, evaluation)}, {part}, in %", figures[part]


def _title(attack: str, evaluation: dict[str, Any]) -> str:
    return attack if attack == "clean" else f"{attack}, {threat_text(evaluation, attack)}"


def _summary(description: dict[str, Any]) -> str:
    height, width = description["image_size"]
    size = f"{description['channels']}x{height}x{width}"
    text = (
        f"`{description['architecture']}` for images {size} in [0, 1] (no further normalisation) "
        f"and {description['num_classes']} classes, which config.json names."
    )
    counts, eps, preset = (description.get(name) for name in ("train_counts", "eps", "preset"))
    how = f" with the preset {markdown_text(str(preset))} of reat_fast" if preset else ""
    if counts and description["dataset"]:
        how += (
            f" on {sum(counts):,} images of {markdown_text(description['dataset'])}, "
            f"{max(counts):,} to {min(counts):,} a class"
        )
    if how:
        text += f" Trained{how}"
        text += f", adversarially with eps {fraction_text(eps)}." if eps is not None else "."
    return text


def _accuracy(description: dict[str, Any]) -> str:
    evaluation = description["evaluation"]
    if evaluation is None:
        return "Not measured."
    names = list(evaluation["attacks"])
    rows = [["part", *names]]
    for part in PARTS:
        values = [evaluation["attacks"][name].get(part) for name in names]
        rows.append([part, *(mean_text([value]) for value in values)])
    tested = f"{evaluation['samples']:,} test images of {markdown_text(evaluation['dataset'])}"
    return (
        f"{markdown(rows)}\nIn %, on {tested}; attacks within "
        f"{threat_text(evaluation)}. "
        "Balanced is the mean over classes; head, body and tail are the "
        f"{sizes_of_parts(description['num_classes'])} of them with the most to the fewest "
        "training images. A stronger attack than those named may find lower figures."
    )


def _loading(repository: str | None) -> str:
    if repository is None:
        return '```python\nfrom reat_fast import load_model\n\nmodel = load_model("FOLDER")\n```'
    return (
        "```python\nfrom huggingface_hub import snapshot_download\n"
        "from reat_fast import load_model\n\n"
        f"model = load_model(snapshot_download({json.dumps(repository)}))\n```"
    )
