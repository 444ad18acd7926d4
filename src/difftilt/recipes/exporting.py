"""Weights of a run in the form that the model's own library loads, with a card that says what they are."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment
from safetensors.torch import save_file

from difftilt import __version__
from difftilt.errors import UserError
from difftilt.models.lora import save_peft
from difftilt.models.protocol import GenerativeModel, Weights
from difftilt.recipes.directory import CONFIG
from difftilt.recipes.evaluating import restore, run_of
from difftilt.recipes.schema import load_recipe
from difftilt.recipes.steered import staged
from difftilt.training.loop import TrainResult

CARD = "README.md"


@dataclass(frozen=True)
class ModelCard:
    """What a reader of the weights wants to know.

    Attributes:
        recipe: resolved values: testbed, reward, method and training.
        role: whose weights they are.
        step: iterations that they have been trained for.
        before, after: held-out numbers.
    """

    recipe: Mapping[str, Any]
    role: str
    step: int
    before: Mapping[str, float] = field(default_factory=dict[str, float])
    after: Mapping[str, float] = field(default_factory=dict[str, float])

    def text(self, lora: Mapping[str, Any] | None) -> str:
        """Markdown, with the header that model hubs read."""
        testbed, method = self.recipe["testbed"], self.recipe.get("method", {}).get("name", "no method")
        base = str(testbed.get("source") or testbed["name"])
        again = "difftilt.train with the same objects" if base.startswith("<") else COMMAND
        facts = {"base model": base, "method": method, "trained by": again}
        facts["reward"] = json.dumps(self.recipe.get("reward") or "of the testbed")
        facts["weights"] = f"LoRA of rank {lora['r']} and alpha {lora['lora_alpha']:g}" if lora else "all"
        facts["role"] = f"{self.role}, after {self.step} iterations"
        numbers = [(name, self.before.get(name), after) for name, after in self.after.items()]
        return _TEMPLATE.render(
            base=base, method=method, facts=facts, numbers=numbers, lora=lora is not None, version=__version__
        )


COMMAND = "difftilt train config.yaml --output RUN"


def _cell(text: str) -> str:
    """Free text in a cell of a table of Markdown: nothing of it can end the cell, or be markup."""
    flat = " ".join(text.split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


_ENVIRONMENT = Environment(autoescape=False, trim_blocks=True, keep_trailing_newline=True)
_ENVIRONMENT.filters |= {"cell": _cell, "number": _number}
_TEMPLATE = _ENVIRONMENT.from_string("""\
---
base_model: {{ base | tojson }}
tags: ["difftilt", {{ method | tojson }}{{ ', "lora"' if lora }}]
---

# {{ base | cell }}, aligned by {{ method | cell }}

| what | value |
| --- | --- |
{% for name, value in facts.items() %}
| {{ name }} | {{ value | cell }} |
{% endfor %}

{% if numbers %}
| held-out number | before | after |
| --- | --- | --- |
{% for name, before, after in numbers %}
| {{ name | cell }} | {{ before | number }} | {{ after | number }} |
{% endfor %}

{% endif %}
The recipe, with every default filled in, is in `config.yaml`. Read the reward beside the drift from the base model
(`kl_reference`, nats) and `diversity`. Written by difftilt {{ version }}.
""")


def export_weights(model: GenerativeModel, weights: Weights, card: ModelCard, config: str, output: Path) -> None:
    """Write weights, card and recipe; the directory appears whole or not at all.

    Args:
        model: says how its library wants them; without that, adapters become a ``peft`` folder and other weights
            ``model.safetensors``.
        weights: of a role.
        card: for ``README.md``.
        config: text of the recipe.
        output: directory that does not exist or is empty.
    """
    with staged(output) as staging:
        if model.export is not None:
            model.export(weights, staging)
        elif weights.lora() is not None:
            save_peft(weights.tensors(), weights.lora(), staging)
        else:
            tensors = {name: value.detach().cpu().contiguous() for name, value in weights.tensors().items()}
            save_file(tensors, staging / "model.safetensors")
        (staging / CARD).write_text(card.text(weights.lora()), encoding="utf-8")
        (staging / "config.yaml").write_text(config, encoding="utf-8")


def export_result(result: TrainResult, role: str | None, output: Path) -> Path:
    """The weights of a run that has just ended in this process; of several processes, all call it and one writes."""
    if result.directory is None:
        raise UserError("export: this run has no directory, so nothing says what its weights are; train with one")
    chosen, config = role or result.role, _config(result.directory)
    recipe = load_recipe(result.directory / CONFIG).resolved()
    card = ModelCard(recipe, chosen, len(result.rows), result.before, result.after)
    world = result.run.world
    if result.run.lockstep is not None:
        world.barrier()
    weights = result.run.roles.held(chosen).assembled(keep=world.main)
    if world.main:
        export_weights(result.run.task.model, weights, card, config, output)
    return output


def export_checkpoint(checkpoint: Path, role: str | None, output: Path) -> Path:
    """The weights of a checkpoint of a run."""
    run = run_of(checkpoint)
    recipe = load_recipe(run / CONFIG)
    restored = restore(recipe, checkpoint)
    chosen = role or restored.method.evaluated_role
    before, after = numbers_of(run) if restored.step == recipe.training.iterations else ({}, {})
    card = ModelCard(recipe.resolved(), chosen, restored.step, before, after)
    export_weights(restored.task.model, restored.roles.held(chosen), card, _config(run), output)
    return output


def _config(run: Path) -> str:
    return (run / CONFIG).read_text(encoding="utf-8")


def numbers_of(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Held-out numbers before and after a run that has ended; empty where it has not."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, {}
    except ValueError as error:
        raise UserError(f"{run / 'summary.json'} is damaged ({error}): remove it to leave out its numbers") from error
    return summary["before"], summary["after"]
