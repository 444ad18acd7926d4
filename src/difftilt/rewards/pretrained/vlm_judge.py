"""What a vision-language model answers when it is asked about an image and its prompt, as a probability."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.rewards.pictures import as_pictures
from difftilt.rewards.pretrained.base import PretrainedReward
from difftilt.rewards.pretrained.loading import PretrainedOptions, Text, frozen, load_network, load_part, needs_both
from difftilt.rewards.protocol import Capabilities, Samples

CARD = Card(
    name="vlm-judge",
    entry="vlm_judge",
    paper="Lin et al. 2024, VQAScore (arXiv 2404.01291): the probability of yes; scores as in Q-Align (Wu et al. 2023, "
    "arXiv 2312.17090)",
    needs=("images", "the extra [rewards]"),
)

QUESTIONS = {
    "yes": 'Does this image show "{prompt}"? Answer with yes or no.',
    "score": 'How well does this image show "{prompt}", from 1 (not at all) to 5 (perfectly)? Answer with one number.',
}
ANSWERS: Mapping[str, Mapping[str, float]] = {
    "yes": {"yes": 1.0, "no": 0.0},
    "score": {str(value): float(value) for value in range(1, 6)},
}


class Config(PretrainedOptions):
    """Settings of the judge."""

    source: Text = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Folder or hub id of a model for images and texts to text, with its processor and chat template."""
    form: Literal["yes", "score"] = "yes"
    """``yes``: p(yes) / (p(yes) + p(no)), in [0, 1]; ``score``: the expected number from 1 to 5."""
    question: Text | None = None
    """Of your own; ``{prompt}`` stands for the user's prompt."""
    answers: dict[str, float] | None = None
    """Of your own: word -> what it is worth."""


class VlmJudge(PretrainedReward):
    """Σ value·p(answer) / Σ p(answer) of the next token after the question; black-box.

    An answer counts in lower case, capitalised, and after a space, wherever that is one token.

    Args:
        model: of ``transformers``, for images and texts to text.
        processor: of images, texts and chats.
        options: see :class:`Config`.
    """

    capabilities = Capabilities(cost=5.0)

    def __init__(self, model: Any, processor: Any, options: Config) -> None:
        super().__init__("vlm_judge", model, options)
        self.model, self.processor = model, processor
        self.question = options.question or QUESTIONS[options.form]
        self.tokens, self.values = answer_tokens(processor.tokenizer, options.answers or ANSWERS[options.form])

    def score_batch(self, samples: Samples) -> Float[Tensor, " batch"]:
        chats = [self._chat(prompt) for prompt in samples.prompts]
        # padding after the text changes nothing for a causal network; before it, it would move the positions
        self.processor.tokenizer.padding_side = "right"
        pictures = [[picture] for picture in as_pictures(samples.media)]
        inputs = self.processor(text=chats, images=pictures, padding=True, return_tensors="pt")
        inputs = inputs.to(samples.media.device, dtype=self.model.dtype)
        last = inputs["attention_mask"].sum(1) - 1
        logits = self.model(**inputs).logits[torch.arange(len(last), device=last.device), last].float()
        chances = logits[:, self.tokens.to(logits.device)].softmax(-1)  # given that it is one of the answers
        return chances @ self.values.to(logits.device)

    def _chat(self, prompt: str) -> str:
        # replaced, not formatted: a prompt may hold braces
        text = self.question.replace("{prompt}", prompt)
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        return self.processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)


def answer_tokens(tokenizer: Any, answers: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """The tokens that begin the answers, and what each is worth.

    Raises:
        UserError: for an answer that is no single token in any form, or one token that two answers share.
    """
    worth = dict[int, float]()
    for answer, value in answers.items():
        found = set(_single(tokenizer, [answer, answer.capitalize(), f" {answer}", f" {answer.capitalize()}"]))
        if not found:
            raise UserError(
                f"vlm_judge: the answer {answer!r} is no single token of this tokenizer: choose another word"
            )
        if found & worth.keys():
            raise UserError(f"vlm_judge: the answer {answer!r} begins like another one: choose words that differ")
        worth |= dict.fromkeys(found, value)
    return torch.tensor(list(worth)), torch.tensor(list(worth.values()))


def _single(tokenizer: Any, forms: Sequence[str]) -> list[int]:
    pieces = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    return [piece[0] for piece in pieces if len(piece) == 1 and piece[0] != tokenizer.unk_token_id]


def vlm_judge(config: Config | None = None, *, model: Any = None, processor: Any = None) -> VlmJudge:
    """The reward.

    Args:
        config: where to load from, and how it asks.
        model: in place of that, with its ``processor``.
        processor: of the model.
    """
    config, user = Config() if config is None else config, "vlm_judge"
    needs_both(user, model=model, processor=processor)
    if model is None:
        processor = load_part("AutoProcessor", config.source, user)
        model = load_network("AutoModelForImageTextToText", config.source, config, user)
    return VlmJudge(frozen(model, config), processor, config)
