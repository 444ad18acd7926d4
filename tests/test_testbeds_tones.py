"""The tones testbed: the grammar, exact synthesis, codec and verifier, features with known energies, reference sets."""

import math
from itertools import combinations
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difftilt.checks.trial import loop_of
from difftilt.errors import UserError
from difftilt.models.saving import from_pretrained
from difftilt.rewards.protocol import Samples
from difftilt.statistics import frechet_distance
from difftilt.testbeds.tones import CHECKPOINT, Config, Tones, decode, is_heldout, latents_of
from difftilt.testbeds.tones_features import CLASSES, DIM, features, frame_features, text_features
from difftilt.testbeds.tones_verifier import ABSENT, PRESENT, Listener, hear, listeners, right
from difftilt.testbeds.tones_world import (
    CATEGORIES,
    CONSONANCES,
    HARMONICS,
    KINDS,
    LENGTH,
    LOWEST,
    NOTES,
    RATE,
    ROOTS,
    VOLUME,
    WORDS,
    Category,
    Chord,
    all_chords,
    draw,
    intervals,
    nominal,
    parse,
    prompts_on,
    synthesise,
    tones,
)
from difftilt.training.measure import heldout_batch, numbers_of

CHORDS = st.sampled_from(all_chords())
SEEDS = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def played(loudness: dict[int, float], decay: float = 4.0) -> Tensor:
    """One waveform of notes at given loudness."""
    row = torch.zeros(1, NOTES)
    for note, loud in loudness.items():
        row[0, note] = loud
    return synthesise(row, torch.tensor([decay]))


def samples(media: Tensor, prompts: list[str]) -> Samples:
    return Samples(media, prompts, prompts, torch.zeros(len(media), dtype=torch.int64))


def test_a_prompt_and_its_wish_agree() -> None:
    assert len(all_chords()) == len({chord.notes for chord in all_chords()}) == len(ROOTS) * len(KINDS)
    assert len(all_chords("consonant")) == len(all_chords("dissonant")) == len(all_chords()) / 2
    for chord in all_chords():
        assert parse(chord.text).chords == (chord,)
    assert parse("").chords == all_chords()
    assert set(parse("a chord on C").chords) == {Chord("C", kind) for kind in KINDS}
    parts = [set(parse(f"a {family} chord on C").chords) for family in ("consonant", "dissonant")]
    assert parts[0] | parts[1] == set(parse("a chord on C").chords)
    assert not parts[0] & parts[1]
    every = prompts_on(ROOTS, CATEGORIES)
    assert {word for prompt in every for word in prompt.split()} == set(WORDS)
    assert {parse(prompt).category for prompt in every} == set(CATEGORIES) == set(get_args(Category))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("A majro", "'majro' is not in the vocabulary; did you mean major[?]"),
        ("H major", "'H' is not in the vocabulary"),
        ("major A", "'major A' names no chord; prompts are like 'A major'"),
        ("a chord", "names no chord"),
        ("a loud chord on A", "'loud' is not in the vocabulary"),
        ("A", "names no chord"),
    ],
)
def test_a_prompt_outside_the_grammar_is_refused_by_name(prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(prompt)
    with pytest.raises(UserError, match=message):
        Tones().encode([prompt])


def test_consonance_of_the_kinds_by_hand() -> None:
    found = {kind: Chord("A", kind).consonance for kind in KINDS}
    partly = {"diminished": 2 / 3, "suspended": 2 / 3}
    assert found == pytest.approx(dict.fromkeys(KINDS, 0.0) | dict.fromkeys(list(KINDS)[:6], 1.0) | partly)
    table = intervals()
    for low, high in combinations(range(NOTES), 2):
        assert table[low, high] == table[high, low] == (1 if (high - low) % 12 in CONSONANCES else -1)


@given(CHORDS, SEEDS)
@settings(deadline=None, max_examples=20)
def test_drawn_waveforms_stay_within_full_scale_and_are_heard_right(chord: Chord, seed: int) -> None:
    waves = draw([parse(chord.text)], generator(seed))
    assert waves.shape == (1, 1, LENGTH)
    assert float(waves.abs().max()) < 1
    heard = hear(waves)
    assert heard.sounding[0].nonzero().flatten().tolist() == sorted(chord.notes)
    assert right(heard, [chord.text]).tolist() == [1]
    assert right(heard, [f"a {chord.family} chord on {chord.root}"]).tolist() == [1]
    assert right(heard, [""]).tolist() == [1]
    assert float(heard.consonance[0]) == pytest.approx(chord.consonance)
    assert float(heard.fidelity[0]) > 0.99


def test_a_note_is_the_sum_of_two_decaying_sines() -> None:
    made = played({7: 0.8}, decay=3.0)[0, 0]
    pitch = LOWEST * 2 ** (7 / 12)
    for place in (0, 1, 17, 500, LENGTH - 1):
        time = place / RATE
        wave = sum(height * math.sin(2 * math.pi * (k + 1) * pitch * time) for k, height in enumerate(HARMONICS))
        assert float(made[place]) == pytest.approx(VOLUME * 0.8 * math.exp(-3 * time) * wave, abs=1e-5)


def test_loudness_is_found_exactly_for_a_decay_of_the_grid() -> None:
    heard = hear(played({0: 0.7, 4: 1.0, 7: 0.6}, decay=4.0))
    wanted = torch.zeros(NOTES)
    wanted[[0, 4, 7]] = torch.tensor([0.7, 1.0, 0.6])
    assert torch.allclose(heard.loudness[0], wanted, atol=1e-4)
    assert float(heard.fidelity[0]) == pytest.approx(1, abs=1e-5)


def test_wrong_notes_are_wrong() -> None:
    prompts = ["A major"] * 4
    waves = torch.cat(
        [
            played({0: 0.8, 4: 0.8, 7: 0.8}),
            played({0: 0.8, 4: 0.8}),  # one is missing
            played({0: 0.8, 4: 0.8, 7: 0.8, 12: 0.8}),  # one too many, an octave of the root
            played({12: 0.8, 16: 0.8, 19: 0.8}),  # an octave too high
        ]
    )
    heard = hear(waves)
    assert right(heard, prompts).tolist() == [1, 0, 0, 0]
    assert right(heard, ["A third"] * 4).tolist() == [0, 1, 0, 0]
    assert heard.consonance.tolist() == pytest.approx([1, 1, 1, 1])


def test_silence_one_note_and_what_is_not_finite_earn_nothing() -> None:
    waves = torch.cat([torch.zeros(1, 1, LENGTH), played({3: 0.8}), played({0: 0.8, 7: 0.8}), played({0: 0.8, 7: 0.8})])
    waves[2, 0, 9], waves[3, 0, 9] = torch.nan, torch.inf
    heard = hear(waves)
    assert heard.consonance.tolist() == [0, 0, 0, 0]
    assert heard.fidelity.tolist() == pytest.approx([0, 1, 0, 0], abs=1e-5)
    assert right(heard, [""] * 4).tolist() == [0, 0, 0, 0]
    faint = hear(played({0: (ABSENT + PRESENT) / 2, 7: (ABSENT + PRESENT) / 2}))  # a pair of halves is a quarter
    assert faint.consonance.tolist() == pytest.approx([0.25], abs=0.01)


def test_fidelity_is_the_share_of_energy_that_is_tone() -> None:
    clean = draw([parse("C minor")] * 64, generator(3))
    noise = 0.1 * torch.randn(clean.shape, generator=generator(4))
    heard = hear(clean + noise)
    energy = clean.square().sum((1, 2))
    share = energy / (energy + noise.square().sum((1, 2)))
    # the notes also explain 24 of 2048 dimensions of the noise, and cross terms do not add up to nothing
    assert torch.allclose(heard.fidelity, share, atol=0.06)
    assert float((heard.fidelity - share).mean().abs()) < 0.01
    # louder than the world is: of loudness 2 it explains 1, and leaves a quarter of the energy
    assert float(hear(played({5: 2.0})).fidelity[0]) == pytest.approx(0.75, abs=1e-4)


def test_consonance_has_a_slope_where_a_note_is_in_doubt() -> None:
    doubt = (ABSENT + PRESENT) / 2
    wave = played({0: 0.8, 7: 0.8, 6: doubt}).requires_grad_()
    # pairs: fifth 1, tritone and second 1/2 each
    score = hear(wave).consonance
    assert score.tolist() == pytest.approx([1 / 2], abs=0.01)
    score.sum().backward()
    assert wave.grad is not None
    stepped = wave.detach() + 0.02 * wave.grad / wave.grad.norm()
    assert float(hear(stepped).loudness[0, 6]) < doubt
    assert float(hear(stepped).consonance[0]) > score.tolist()[0]


def test_rewards_share_one_hearing_and_never_a_stale_one() -> None:
    listener = Listener()
    consonance, accuracy, fidelity = listeners(listener)
    first, second = played({0: 0.8, 7: 0.8}), played({0: 0.8, 6: 0.8})
    assert listener.hear(first) is listener.hear(first)
    assert consonance.score(samples(first, [""])).tolist() == pytest.approx([1])
    assert consonance.score(samples(second, [""])).tolist() == pytest.approx([0])
    assert accuracy.score(samples(second, ["A tritone"])).tolist() == [1]
    assert accuracy.score(samples(second, ["A fifth"])).tolist() == [0]
    media = first.clone().requires_grad_()
    fidelity.score(samples(media, [""])).sum().backward()
    assert media.grad is not None


def test_the_codec_is_exact_and_clips_beyond_full_scale() -> None:
    waves = draw([parse("")] * 3, generator(0))
    assert torch.equal(decode(latents_of(waves)), waves)
    latents = 2 * torch.rand(2, *Tones().task().model.shape, generator=generator(1)) - 1
    assert torch.equal(latents_of(decode(latents)), latents)
    assert float(decode(latents * 9).abs().max()) == 1


def test_energies_of_features_are_what_the_docstring_says() -> None:
    time = torch.arange(LENGTH) / RATE
    steady = [VOLUME * (2 * torch.pi * pitch * time).sin() for pitch in (LOWEST, 2 * LOWEST, 4 * LOWEST, 60.0)]
    found = frame_features(torch.stack(steady)[:, None])
    assert found.shape == (4, 5, DIM)
    # a steady sine of a note of loudness 1 has the feature 1, but for what leaks to neighbours, in its class
    assert found[:3, :, 0].flatten().tolist() == pytest.approx([1.0] * 15, abs=0.05)
    assert float(found[:3, :, 3:10].max()) < 0.02
    assert found[3, :, CLASSES].tolist() == pytest.approx([1.0] * 5, abs=0.05)
    assert float(found[3, :, :CLASSES].max()) < 0.02
    assert torch.equal(features(torch.stack(steady)[:, None]), found.mean(1))


def test_features_of_silence_are_zero_with_a_finite_slope() -> None:
    silence = torch.zeros(1, 1, LENGTH, requires_grad=True)
    found = features(silence)
    assert not found.detach().any()
    found.sum().backward()
    assert silence.grad is not None
    assert bool(silence.grad.isfinite().all())


def test_features_turn_with_the_root() -> None:
    low, high = (features(nominal([Chord(root, "major")]))[0, :CLASSES] for root in ("A", "D"))
    assert torch.allclose(low.roll(ROOTS.index("D")), high, atol=0.15)  # leaks shrink as semitones widen
    assert int(low.argmax()) in Chord("A", "major").notes


def test_texts_lead_to_the_features_of_what_they_name() -> None:
    told = text_features(["C minor", "a chord on C", ""])
    drawn = features(draw([parse("C minor")] * 256, generator(5))).mean(0)
    # loudness and decay enter through a logarithm, so the mean of features is not that of mean loudness
    assert torch.allclose(told[0], drawn, atol=0.05)
    named = text_features([f"C {kind}" for kind in KINDS])
    assert torch.allclose(told[1], named.mean(0), atol=1e-6)
    assert torch.allclose(told[2], text_features([chord.text for chord in all_chords()]).mean(0), atol=1e-6)


def test_reference_sets_are_fixed_and_of_their_kind() -> None:
    bed = Tones()
    kinds: tuple[Literal["consonant", "dissonant", "data"], ...] = ("consonant", "dissonant", "data")
    shares = [(hear(bed.reference(kind, 144)).consonance == 1).double().mean() for kind in kinds]
    assert [float(share) for share in shares] == [1, 0, 0.5]
    assert torch.equal(bed.reference("data", 144), bed.reference("data", 144))


def test_rewards_of_sets_prefer_consonant_sets_by_waveforms_and_by_texts() -> None:
    bed = Tones()
    rewards = bed.rewards()
    good = draw([parse(chord.text) for chord in all_chords("consonant")] * 2, generator(6))
    bad = draw([parse(chord.text) for chord in all_chords("dissonant")] * 2, generator(6))
    same = draw([parse("A octave")] * 144, generator(6))
    scores = {
        name: [float(rewards[name].score(samples(waves, [""] * 144))[0]) for waves in (good, bad, same)]
        for name in ("frechet", "frechet_text", "vendi")
    }
    for name in ("frechet", "frechet_text"):
        assert scores[name][0] > scores[name][1] / 3 > scores[name][2]
        assert rewards[name].capabilities.set_valued
    assert scores["vendi"][0] > 2 * scores["vendi"][2]
    assert scores["vendi"][2] == pytest.approx(1, abs=0.1)
    assert float(frechet_distance(features(good), features(bed.reference()))) == pytest.approx(bed.distance(good))


def test_the_reward_of_each_sample_sees_noise_and_strange_spectra() -> None:
    reward = Tones().rewards()["frechet_per_sample"]
    waves = torch.cat([nominal([Chord("A", "major")]), 0.2 * torch.randn(1, 1, LENGTH, generator=generator(7))])
    chord, noise = reward.score(samples(waves, [""] * 2)).tolist()
    assert chord > noise
    assert not reward.capabilities.set_valued


def test_what_is_held_out_is_trained_on_in_other_combinations() -> None:
    task = Tones(Config(categories=("named", "family"))).task()
    trained, heldout = set(task.prompts), set(task.heldout_prompts)
    assert not trained & heldout
    assert trained | heldout == set(prompts_on(ROOTS, ("named", "family")))
    assert {word for prompt in trained for word in prompt.split()} == set(WORDS)
    named = [parse(prompt).chords[0] for prompt in heldout if parse(prompt).category == "named"]
    assert sorted(chord.root for chord in named) == sorted(ROOTS * 3)
    assert sum(chord.family == "consonant" for chord in named) == len(named) / 2
    open_ones: tuple[Category, ...] = ("empty", "free")
    for category in open_ones:
        task = Tones(Config(categories=(category,))).task()
        assert task.prompts == task.heldout_prompts
        assert not any(is_heldout(prompt) for prompt in task.prompts)


@pytest.mark.parametrize("reward", ["consonance", "fidelity", "frechet", "frechet_text", "frechet_per_sample", "vendi"])
def test_every_reward_can_be_chosen_and_the_others_are_reported(
    reward: Literal["consonance", "fidelity", "frechet", "frechet_text", "frechet_per_sample", "vendi"],
) -> None:
    task = Tones(Config(reward=reward, categories=("empty",))).task()
    assert task.reward.name == reward
    assert set(task.heldout) == {"consonance", "accuracy", "fidelity", "frechet", "vendi"} - {reward}


def test_an_evaluation_reports_rewards_of_samples_and_of_sets() -> None:
    task = Tones(Config(categories=("empty",))).task()
    run = loop_of("diffusion-nft", task).run
    media = draw([parse("")] * 4, generator(8))
    batch = heldout_batch(run, 4)
    numbers = numbers_of(run, Samples(media, [""] * 4, [""] * 4, batch.group))
    assert {*task.heldout, "reward", "diversity"} <= set(numbers)
    assert all(math.isfinite(number) for number in numbers.values())


def test_the_checkpoint_is_small_and_computes_in_single_precision() -> None:
    files = [file for file in CHECKPOINT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 5e6
    assert {value.dtype for value in from_pretrained(CHECKPOINT / "denoiser").state_dict().values()} == {torch.float16}
    network = Tones().task().model.network
    assert isinstance(network, torch.nn.Module)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_the_empty_prompt_is_the_unconditional_branch() -> None:
    task = Tones().task()
    empty = task.model.encode(["", ""])
    assert task.model.null_condition is not None
    null = task.model.null_condition(2)
    assert isinstance(empty, dict)
    assert isinstance(null, dict)
    assert all(torch.equal(empty[key], null[key]) for key in null)
    assert not null["text_keep"].any()
    assert task.rate == RATE
    assert len(tones()) == NOTES
