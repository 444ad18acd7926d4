"""Aesthetic score, HPSv2 and ImageReward: heads, and published weights read into the networks of transformers."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from difftilt.errors import UserError
from difftilt.rewards.pretrained import aesthetic as aesthetic_leaf
from difftilt.rewards.pretrained import hps as hps_leaf
from difftilt.rewards.pretrained.aesthetic import aesthetic
from difftilt.rewards.pretrained.heads import LinearHead, head_of
from difftilt.rewards.pretrained.hps import hps
from difftilt.rewards.pretrained.image_reward import MEAN, STD, blip_of, from_blip, image_reward, published_blip
from difftilt.rewards.pretrained.loading import fill, load_weights
from difftilt.rewards.pretrained.open_clip import from_open_clip
from difftilt.rewards.pretrained.pixels import Preparation
from pipelines import clip_tokenizer, made
from pretrained import EDGE, clip, hold, images, samples, save_clip, seeded, slope, vision_settings


def published_head(width: int) -> nn.Module:
    """The layers as published, with their drop-outs."""
    maps = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64)]
    maps += [nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*maps)))


def head_weights(width: int) -> dict[str, Tensor]:
    return dict(seeded(lambda: published_head(width)).state_dict())


def test_the_head_is_the_published_one() -> None:
    published = seeded(lambda: published_head(8))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for prefix in ("", "mlp."):
        head = head_of({prefix + name: value for name, value in published.state_dict().items()}, "test")
        torch.testing.assert_close(head(x), published(x)[:, 0], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="test: these weights hold no head"):
        head_of({"weight": x}, "test")
    short = {name: value for name, value in published.state_dict().items() if "7" not in name}
    with pytest.raises(UserError, match=r"another network: they hold no layers\.7\.weight and 1 more"):
        head_of(short, "test")


def test_aesthetic(tmp_path: Path) -> None:
    model, head, given = clip(), head_weights(8), samples(images())
    reward = aesthetic(model=model, head=head)
    scores = hold(reward, given, -1e4, 1e4)
    pixels = Preparation.square(EDGE)(given.media)
    with torch.no_grad():
        embedded = model.visual_projection(model.vision_model(pixels).pooler_output)
        expected = seeded(lambda: published_head(8))(normalize(embedded, dim=-1))[:, 0]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    assert float(scores.std()) > 1e-3
    slope(reward, given)
    renamed = reward.score(samples(images(), ["x", "y", "z"]))
    assert torch.equal(renamed, scores)  # no prompt is looked at
    save_clip(tmp_path, made("CLIPImageProcessorPil", size={"shortest_edge": EDGE}, crop_size=EDGE))
    save_file(head, tmp_path / "head.safetensors")
    config = aesthetic_leaf.Config(source=str(tmp_path), head=str(tmp_path / "head.safetensors"))
    torch.testing.assert_close(aesthetic(config).score(given), scores, atol=1e-5, rtol=1e-4)
    torch.save({"state_dict": head}, tmp_path / "head.pth")
    config = config.model_copy(update={"head": str(tmp_path / "head.pth")})
    torch.testing.assert_close(aesthetic(config).score(given), scores, atol=1e-5, rtol=1e-4)


class Block(nn.Module):
    """A residual block as ``open_clip`` has it, on torch's own attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 32), gelu=nn.GELU(), c_proj=nn.Linear(32, width)))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """Blocks under the name that ``open_clip`` gives them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width) for _ in range(2)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Eye(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 7, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(16))
        self.positional_embedding = nn.Parameter(torch.randn(17, 16))
        self.ln_pre, self.ln_post, self.transformer = nn.LayerNorm(16), nn.LayerNorm(16), Tower(16)
        self.proj = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP written down from its paper, with the names of ``open_clip``."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.visual, self.transformer = Eye(), Tower(16)
        self.token_embedding = nn.Embedding(vocabulary, 16)
        self.positional_embedding = nn.Parameter(torch.randn(length, 16))
        self.ln_final = nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def cosine(self, pixels: Tensor, tokens: Tensor, end: int) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, mask))
        last = (tokens == end).int().argmax(1)
        text = x[torch.arange(len(x)), last] @ self.text_projection
        return (normalize(self.visual(pixels), dim=-1) * normalize(text, dim=-1)).sum(-1)


def test_weights_of_open_clip_give_the_same_network(tmp_path: Path) -> None:
    model = clip(hidden_act="gelu")
    model.config.vision_config.hidden_act = "gelu"
    model = made("CLIPModel", model.config).eval()
    theirs = seeded(lambda: OpenClip(len(clip_tokenizer()), 32), scale=2.0)
    fill(model, from_open_clip(theirs.state_dict()), "test")
    given = samples(images(3, 40, 61))
    whole = Preparation(size=(EDGE, EDGE), fit="longest", crop=None)
    tokens = clip_tokenizer()(given.prompts, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = theirs.cosine(whole(given.media), tokens, 1)
    reward = hps(model=model, tokenizer=clip_tokenizer())
    scores = hold(reward, given, -1, 1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert float(scores.std()) > 0.01
    slope(reward, given)
    # the path that a user takes: the published kind of file, and a folder with the architecture
    torch.save({"epoch": 1, "state_dict": theirs.state_dict()}, tmp_path / "hps.pt")
    model.config.save_pretrained(tmp_path)
    clip_tokenizer().save_pretrained(tmp_path)
    config = hps_leaf.Config(weights=str(tmp_path / "hps.pt"), architecture=str(tmp_path))
    torch.testing.assert_close(hps(config).score(given), expected, atol=1e-5, rtol=0)
    clipped = {name: value for name, value in theirs.state_dict().items() if name != "visual.proj"}
    with pytest.raises(UserError, match=r"hold no visual_projection\.weight"):
        fill(model, from_open_clip(clipped), "test")


class Seeing(nn.Module):
    """A vision transformer with the names of BLIP, after Dosovitskiy et al. 2021."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 16, 7, 7)})
        self.blocks = nn.ModuleList([self.block() for _ in range(2)])
        self.norm = nn.LayerNorm(16, eps=1e-6)

    def block(self) -> nn.ModuleDict:
        attention = nn.ModuleDict({"qkv": nn.Linear(16, 48), "proj": nn.Linear(16, 16)})
        mlp = nn.ModuleDict({"fc1": nn.Linear(16, 32), "fc2": nn.Linear(32, 16)})
        norms = {name: nn.LayerNorm(16, eps=1e-6) for name in ("norm1", "norm2")}
        return nn.ModuleDict({**norms, "attn": attention, "mlp": mlp})

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        block: Any
        for block in self.blocks:
            parts = block["attn"]["qkv"](block["norm1"](x)).chunk(3, -1)
            heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in parts]
            seen = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            x = x + block["attn"]["proj"](seen)
            x = x + block["mlp"]["fc2"](gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return self.norm(x)


def bert_tokenizer() -> Any:
    """Words and pieces in the manner of BERT."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "two", "dogs", "by", "the", "sea"]
    return made("BertTokenizer", vocab={piece: place for place, piece in enumerate(pieces)})


def blip() -> Any:
    library = __import__("transformers")
    eye = made("BlipVisionConfig", **vision_settings(), layer_norm_eps=1e-6)
    reader = made("BlipTextConfig", vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                  num_attention_heads=2, encoder_hidden_size=16, max_position_embeddings=40, bos_token_id=2,
                  eos_token_id=3, pad_token_id=0, sep_token_id=3)  # fmt: skip
    return seeded(lambda: blip_of(library, eye, reader), scale=2.0)


def test_image_reward() -> None:
    model, head, given = blip(), head_weights(16), samples(images())
    reward = image_reward(model=model, tokenizer=bert_tokenizer(), head=head)
    scores = hold(reward, given, -1e4, 1e4)
    assert float(scores.std()) > 1e-3
    slope(reward, given)
    swapped = reward.score(samples(images(), ["two dogs", "a red cat", "the sea"]))
    assert float((swapped - scores).abs().min()) > 1e-5  # the prompt is read
    plain = LinearHead(16)
    fill(plain, {name: torch.zeros_like(value) for name, value in plain.state_dict().items()}, "test")
    silent = image_reward(model=model, tokenizer=bert_tokenizer(), head=plain.state_dict())
    torch.testing.assert_close(silent.score(given), torch.full((3,), -MEAN / STD))
    with pytest.raises(UserError, match="give tokenizer and head with model"):
        image_reward(model=model)


def test_weights_of_blip_give_the_same_network() -> None:
    model, theirs = blip(), seeded(Seeing)
    tensors = {f"blip.visual_encoder.{name}": value for name, value in theirs.state_dict().items()}
    tensors |= {f"blip.text_encoder.{name}": value for name, value in model.text_encoder.state_dict().items()}
    tensors |= {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None], "mlp.layers.0.bias": torch.ones(1)}
    fill(model, from_blip(tensors), "test")
    x = Preparation.square(EDGE)(images())
    with torch.no_grad():
        torch.testing.assert_close(model.vision_model(x).last_hidden_state, theirs(x), atol=1e-4, rtol=1e-4)


def test_the_published_network_has_the_sizes_of_its_file() -> None:
    with torch.device("meta"):
        network = published_blip("test")
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["vision_model.encoder.layers.23.self_attn.qkv.weight"] == (3072, 1024)
    assert shapes["vision_model.embeddings.position_embedding"] == (1, 197, 1024)
    assert shapes["text_encoder.embeddings.word_embeddings.weight"] == (30524, 768)
    assert shapes["text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert not any("pooler" in name for name in shapes)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, value in (("a.pt", [torch.ones(1)]), ("b.pt", {"state_dict": {"x": 1}})):
        torch.save(value, tmp_path / name)
        with pytest.raises(UserError, match="it holds no named tensors; is the file complete"):
            load_weights(str(tmp_path / name), "test")
    torch.save({"x": Path("danger")}, tmp_path / "c.pt")  # an object: nothing but tensors and plain values is read
    with pytest.raises(UserError, match="Weights only load failed"):
        load_weights(str(tmp_path / "c.pt"), "test")
    with pytest.raises(UserError, match="neither a file nor an id on the hub, which is OWNER/NAME/FILE"):
        load_weights("owner/name", "test")
