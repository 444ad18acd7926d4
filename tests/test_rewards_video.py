"""A reward of images becomes one of videos: frames by hand, weights as published, recipes that name both."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from difftilt.config import Problems
from difftilt.errors import UserError
from difftilt.recipes.parts import read_part
from difftilt.rewards import Capabilities, Reward, Samples, as_reward
from difftilt.rewards.image import ink
from difftilt.rewards.video import Config, VideoReward, attenuation, pick_frames


def videos(frames: int = 6) -> Samples:
    """Frame f of video v has the brightness (v + 1)·(f + 1)/100."""
    bright = torch.arange(1, 3)[:, None] * torch.arange(1, frames + 1)[None] / 100
    media = bright[:, :, None, None, None].expand(-1, -1, 3, 4, 4).clone()
    return Samples(media, ["one", "two"], ["", ""], torch.tensor([4, 7]), torch.tensor([[1.0], [2.0]]), {"key": [5, 6]})


def test_the_mean_over_all_frames_is_the_default() -> None:
    scores = VideoReward(Config(), ink()).score(videos())
    torch.testing.assert_close(scores, torch.tensor([0.035, 0.07]))


def test_one_frame_of_each_segment() -> None:
    middle = VideoReward(Config(segments=3), ink()).score(videos())
    torch.testing.assert_close(middle, torch.tensor([0.04, 0.08]))  # frames 1, 3 and 5 of six: 2, 4 and 6 hundredths
    first = VideoReward(Config(segments=3, pick="first"), ink()).score(videos())
    torch.testing.assert_close(first, torch.tensor([0.03, 0.06]))


def test_frames_fade_from_the_middle_as_published() -> None:
    decay, frames = 0.7, 6
    weights = [math.exp(-decay * abs(frame - 3)) for frame in range(frames)]
    expected = sum(weight * (frame + 1) / 100 for frame, weight in enumerate(weights)) / frames
    scores = VideoReward(Config(decay=decay), ink()).score(videos())
    torch.testing.assert_close(scores, torch.tensor([expected, 2 * expected], dtype=torch.float32))
    published = attenuation(torch.arange(16)[None], 16, 1.0)[0]
    assert float(published[0]) == pytest.approx(math.exp(-8))
    assert float(published[8]) == 1
    assert float(published[15]) == pytest.approx(math.exp(-7))


@pytest.mark.parametrize(("frames", "segments"), [(16, 4), (7, 3), (5, 5), (9, 1)])
def test_every_segment_gives_one_of_its_own_frames_and_all_of_them_are_reached(frames: int, segments: int) -> None:
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1, None].expand(-1, segments)
    chosen = pick_frames(frames, shares)
    edges = [place * frames // segments for place in range(segments + 1)]
    for segment in range(segments):
        assert set(chosen[:, segment].tolist()) == set(range(edges[segment], edges[segment + 1]))


def test_each_frame_comes_with_what_belongs_to_its_video() -> None:
    seen = list[Samples]()

    def look(samples: Samples) -> Tensor:
        seen.append(samples)
        return samples.media.flatten(1).mean(1)

    reward = VideoReward(Config(segments=2), as_reward(look))
    reward.score(videos())
    (given,) = seen
    assert given.media.shape == (4, 3, 4, 4)
    assert given.prompts == ["one", "one", "two", "two"]
    assert given.group.tolist() == [4, 4, 7, 7]
    assert given.metadata == {"key": [5, 5, 6, 6]}
    assert torch.equal(torch.as_tensor(given.condition), torch.tensor([[1.0], [1.0], [2.0], [2.0]]))


def test_gradients_reach_the_frames_that_were_picked_and_no_others() -> None:
    given = videos()
    media = given.media.requires_grad_()
    chosen = torch.tensor([[0, 5], [2, 2]])
    score = VideoReward(Config(decay=0.1), ink()).score_frames(given, chosen).sum()
    reached = torch.autograd.grad(score, media)[0].flatten(2).abs().sum(2) > 0
    assert reached.tolist() == [[True, False, False, False, False, True], [False, False, True, False, False, False]]


def test_capabilities_follow_the_image_reward() -> None:
    class Set:
        name, capabilities = "set", Capabilities(set_valued=True)

        def score(self, samples: Samples) -> Tensor:
            return samples.media

    reward: Reward = VideoReward(Config(segments=4), ink())
    assert reward.capabilities == Capabilities(differentiable=True)
    assert reward.name == "video_ink"
    with pytest.raises(UserError, match="'set' scores sets"):
        VideoReward(Config(), Set())


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(UserError, match=r"video_ink scores a video.*given images of shape .*: use the image reward"):
        VideoReward(Config(), ink()).score(Samples(torch.zeros(2, 3, 4, 4), ["", ""], ["", ""], torch.zeros(2).long()))
    with pytest.raises(UserError, match="segments = 7, and the video has 6 frames"):
        VideoReward(Config(segments=7), ink()).score(videos())


def test_a_recipe_names_both(tmp_path: Path) -> None:
    problems = Problems()
    section = {"name": "video", "segments": 2, "reward": {"name": "image", "kind": "ink", "dark": True}}
    part = read_part("rewards", "reward", section, problems)
    problems.check("test")
    assert part is not None
    assert part.resolved() == section | {"pick": "middle", "decay": 0.0}
    scores = part.build().score(videos())
    torch.testing.assert_close(scores, 1 - VideoReward(Config(segments=2), ink()).score(videos()))
    for wrong, message in (
        ({"name": "video"}, "reward.reward: needs a name"),
        ({"name": "video", "reward": {"name": "image", "kind": "inc"}}, "reward.reward.kind"),
        ({"name": "video", "reward": {"name": "imgae"}}, "reward.reward.name"),
    ):
        problems = Problems()
        assert read_part("rewards", "reward", wrong, problems) is None
        assert message in problems.lines[0]
