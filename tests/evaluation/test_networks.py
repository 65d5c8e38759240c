"""Networks from files in the format of the real ones, small and random, against forwards written out here or another library's."""

from __future__ import annotations

import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, gelu, layer_norm, linear

from ddil_lightning import servers
from ddil_lightning.evaluation import presence
from ddil_lightning.evaluation.batches import as_saved
from ddil_lightning.evaluation.given import Given
from ddil_lightning.evaluation.networks import NETWORKS, Absent, Networks, Spec, imagereward, open_clip_net, read_networks, weights
from ddil_lightning.evaluation.networks import clip as clip_file
from ddil_lightning.evaluation.networks import lpips as lpips_file
from ddil_lightning.evaluation.presence import needing, present
from ddil_lightning.evaluation.registry import keys
from ddil_lightning.evaluation.suite import Probes, Suite

MEAN, STD = (torch.tensor(x)[:, None, None] for x in imagereward.PIXELS)
PROMPTS = ["A red Square", "a square and a cat", "cat"]


def pictures(n: int, side: int = 20, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def resized(images: Tensor, side: int) -> Tensor:
    """Images as Pillow's bicubic makes them, [B, 3, side, side] in [0, 1]: squares, so that nothing is cut."""
    arrays = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    small = [np.array(Image.fromarray(a).resize((side, side), Image.Resampling.BICUBIC)) for a in arrays]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, also those that start as ones or zeros: what is swapped or left out shows."""
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=rng) * 0.3 + (p.data == 1)
    return net.eval()


# What a config and the command line name


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("lpips", Spec("lpips")),
        ("inception:/a/b:c.pth", Spec("inception", "/a/b:c.pth")),
        ({"name": "open_clip", "path": "x.pt", "prefix": "A photo depicts"}, Spec("open_clip", "x.pt", {"prefix": "A photo depicts"})),
        ({"name": "hps", "version": 2.0}, Spec("hps", None, {"version": "2.0"})),
    ],
)
def test_a_network_is_named_in_a_text_or_a_table(given: Any, read: Spec) -> None:
    assert Spec.read(given) == read


def test_words_of_the_command_line() -> None:
    words = [
        "hps:/models/hps.pt",
        "dinov2",
        "features=inception_clean_fid:a=b.pth",
        "distance=none",
        'clip={name: open_clip, prefix: "A, b"}',
    ]
    made = read_networks(words)
    assert made.hps == Spec("hps", "/models/hps.pt") and made.embed == Spec("dinov2") and made.distance is None
    assert made.features == Spec("inception_clean_fid", "a=b.pth") and made.clip == Spec("open_clip", None, {"prefix": "A, b"})
    assert read_networks([]) == Networks("inception", "open_clip", "lpips")
    assert read_networks(["features=dino"]).about()["features"] == "DINO facebook/dino-vits16"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("dinov3", "no network 'dinov3': did you mean dinov2? choose inception, "),
        ("depth=dino", "depth=dino: networks are for features, clip, distance, embed, hps, pickscore, image_reward, not depth"),
        ("text=open_clip", "networks are for features"),
        ("distance=inception", "inception is no network for distance: choose lpips"),
        ("inception:", "network inception: path is ''; give weights-inception-2015-12-05-6726825d.pth of github.com"),
        ("{name: lpips, nett: vgg}", "network lpips: no option nett: 'vgg'; it has path, net, each a text"),
        (
            "{name: open_clip, prefix: [a]}",
            "network open_clip: no option prefix: ['a']; it has path, model, pretrained, prefix, each a text",
        ),
        ("{lpips", "{lpips is no table: write {name: NAME"),
        ("{}", "no network None: choose inception"),
    ],
)
def test_a_word_that_says_nothing_is_refused_in_a_line(word: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        read_networks([word])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_twice_is_once_too_often() -> None:
    with pytest.raises(ValueError, match="embed=dino: embed is named twice"):
        read_networks(["dinov2", "embed=dino"])


# What cannot be had


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and empty caches; answers the hub's."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    servers.unreachable.cache_clear()
    presence._tell.cache_clear()
    yield tmp_path / "hub"
    servers.unreachable.cache_clear()


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_that_cannot_be_had_says_so_at_once(name: str, nowhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    if name.startswith("inception"):
        pytest.importorskip("torch_fidelity")  # without it, that would be what is told
    entry, start = NETWORKS[name], time.perf_counter()
    member = entry.members[0]
    with caplog.at_level(logging.WARNING, presence.__name__):
        made = present(Networks(**{member: name}))
        present(Networks(**{member: name}))  # told once
    lost, told = ", ".join(needing(member)), [r.getMessage() for r in caplog.records if r.name == presence.__name__]
    assert getattr(made, member) is None and len(told) == 1 and "\n" not in told[0]
    assert told[0].startswith(f"without the network {name} there is no {lost}: ") and "HF_HUB_OFFLINE is set" in told[0]
    assert told[0].endswith(f"; give {entry.file}, as {member}={name}:PATH")
    with pytest.raises(ValueError, match=f"^the network {name}, which {lost} look through, cannot be had: "):
        present(Networks(**{member: name}, strict=True))
    with pytest.raises(Absent):
        Networks(**{member: name}).load()
    with pytest.raises(ValueError, match=f"network {name}: missing is not there: give ") as error:  # his own is refused
        present(Networks(**{member: f"{name}:missing"}))
    assert not isinstance(error.value, Absent) and time.perf_counter() - start < 60


def test_every_number_that_needs_a_network_is_known() -> None:
    assert {"frechet", "kid", "coverage", "patch_frechet", "frechet_teacher"} < {*needing("features")} and "clip" not in needing("features")
    assert needing("embed") == ["cmmd", "vendi", "feature_diversity"] and needing("clip") == ["clip"]
    assert [*needing("hps"), *needing("pickscore"), *needing("image_reward")] == ["hps", "pickscore", "image_reward"] == keys()[-3:]


def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that takes the connection and then says nothing, for which torch's download waits for ever."""
    monkeypatch.setattr(servers, "PATIENCE", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers.unreachable.cache_clear()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        server, start = f"http://127.0.0.1:{silent.getsockname()[1]}", time.perf_counter()
        with pytest.raises(Absent, match=rf"torch's cache has no .*x\.pth, and {server} does not answer \(timed out\)"):
            weights.url_file(f"{server}/a/x.pth")
        assert servers.unreachable(server) and time.perf_counter() - start < 20


def test_what_is_no_table_of_weights_is_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Code()}, tmp_path / "code.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10")
    (tmp_path / "torn.pt").write_bytes(b"nothing")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    for name, said in (
        ("code.pt", "holds more than tensors, which is not read"),
        ("torn.safetensors", "cannot be read as weights"),
        ("torn.pt", "torn.pt "),
        ("list.pt", "holds no table of weights"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            weights.read(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    torch.save({"epoch": 3, "state_dict": {"module.a": torch.ones(2)}}, tmp_path / "whole.pt")
    assert weights.read(tmp_path / "whole.pt").keys() == {"a"}
    with pytest.raises(ValueError, match=r"whole\.pt holds no weights of it: it lacks bias \(3 such differences\)"):
        weights.fit(nn.Linear(2, 1), weights.read(tmp_path / "whole.pt"), tmp_path / "whole.pt", "it")


# CLIP of open_clip, HPSv2


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A file of a tiny model's weights as HPSv2's are stored, and the model."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
    (folder / "ddil-tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    model = randomised(open_clip.create_model("ddil-tiny-clip"))
    torch.save({"epoch": 7, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder / "HPS_v2.1_compressed.pt", model


def seen(model: Any, images: Tensor, prompts: list[str]) -> Tensor:
    import open_clip

    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer("ddil-tiny-clip")(prompts))
        return cosine_similarity(model.encode_image((resized(images, 16) - MEAN) / STD), text)


def test_clip_and_hps_are_the_cosine_of_their_model(clip: tuple[Path, Any]) -> None:
    path, model = clip
    images, expected = pictures(3), seen(clip[1], pictures(3), PROMPTS)
    nets = Networks(
        clip={"name": "open_clip", "path": str(path), "model": "ddil-tiny-clip"},
        hps={"name": "hps", "path": str(path.parent), "model": "ddil-tiny-clip"},
        embed={"name": "clip_l14_336", "path": str(path), "model": "ddil-tiny-clip"},
    ).load()
    for score in (nets.clip, nets.hps):
        torch.testing.assert_close(score(images, PROMPTS).float(), expected, atol=2e-4, rtol=0)
    embedded = model.encode_image((resized(images, 16) - MEAN) / STD)
    torch.testing.assert_close(nets.embed(images), embedded.detach(), atol=2e-3, rtol=0)
    digest = nets.about()["clip"].split()[-1]
    assert nets.about()["clip"] == f"OpenCLIP ddil-tiny-clip, HPS_v2.1_compressed.pt sha256 {digest}"
    assert nets.about()["hps"] == f"HPS v2.1, ddil-tiny-clip, HPS_v2.1_compressed.pt sha256 {digest}"


def test_hps_pads_what_is_no_square(clip: tuple[Path, Any]) -> None:
    """A wide image is shrunk to 16 x 8 and stands on black, where CLIP's own preprocessing would cut it."""
    wide = pictures(1, 32)[:, :, :16]
    scored = Networks(hps={"name": "hps", "path": str(clip[0]), "model": "ddil-tiny-clip"}).load().hps(wide, ["cat"])
    array = ((wide[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    small = torch.from_numpy(np.array(Image.fromarray(array).resize((16, 8), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    padded = torch.nn.functional.pad(small, (0, 0, 4, 4))[None] / 127.5 - 1
    torch.testing.assert_close(scored.float(), seen(clip[1], padded, ["cat"]), atol=2e-3, rtol=0)


def test_a_checkpoint_of_open_clip_that_does_not_fit(clip: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.pt is not there: give a file, or a folder with open_clip_model\.safetensors"):
        open_clip_net("ddil-tiny-clip", str(tmp_path / "missing.pt"))
    with pytest.raises(ValueError, match="open_clip knows no weights 'laion3b' of ViT-B-32: give a file, or one of openai, "):
        open_clip_net("ViT-B-32", "laion3b")
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-Z'"):
        open_clip_net("ViT-Z", str(clip[0]))
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt holds no weights of OpenCLIP ddil-tiny-clip: ") as error:
        open_clip_net("ddil-tiny-clip", str(tmp_path / "other.pt"))
    assert "\n" not in str(error.value)


def test_weights_of_a_tag_get_the_gelu_that_they_were_trained_with(clip: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's, MetaCLIP's and DFN's have QuickGELU, which the architectures of their names have not."""
    import open_clip

    small = open_clip.get_model_config("ddil-tiny-clip")
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**small, "quick_gelu": name.endswith("quickgelu")})
    monkeypatch.setattr(clip_file, "_tagged", lambda tag: clip[0])
    scored = {}
    for name, tag in (("ViT-B-32", "openai"), ("ViT-B-32-quickgelu", "openai"), ("ViT-B-32", "laion2b_s34b_b79k")):
        net = open_clip_net(name, tag)
        scored[name, tag] = net.score(pictures(3), PROMPTS)
        assert net.about == f"OpenCLIP ViT-B-32{'-quickgelu' if tag == 'openai' else ''} {tag}"
    plain, quick, other = scored.values()
    assert torch.equal(plain, quick) and not torch.allclose(plain, other, atol=1e-3)
    with pytest.raises(ValueError, match="knows no weights 'laion2b_s34b_b79k' of ViT-B-32-quickgelu: give a file, or one of openai, "):
        open_clip_net("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


# PickScore, DINO


def sees(folder: Path, kind: str, side: int) -> None:
    """A preprocessor_config.json as the repositories have it, some of them with the names of years ago."""
    numbers: dict[str, Any] = {"image_mean": MEAN.flatten().tolist(), "image_std": STD.flatten().tolist(), "resample": 3}
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": side,
        "do_center_crop": True,
        "do_resize": True,
        "do_normalize": True,
    }
    if kind.endswith("Extractor"):
        sizes |= {"size": side, "feature_extractor_type": kind}
    else:
        sizes |= {"image_processor_type": kind}
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers | sizes))


def test_pickscore_is_a_hundred_cosines(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocab = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({x: i for i, x in enumerate(vocab)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}))
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(vocab), "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    model = randomised(CLIPModel(config))
    model.logit_scale.data.fill_(4.6052)  # 100, as the real ones have it
    model.save_pretrained(tmp_path)
    sees(tmp_path, "CLIPFeatureExtractor", 16)
    net = Networks(pickscore=f"pickscore:{tmp_path}").load().pickscore
    words = CLIPTokenizer.from_pretrained(tmp_path)
    images, expected = pictures(3), []
    for x, prompt in zip((resized(images, 16) - MEAN) / STD, PROMPTS, strict=True):  # one by one: padding must not count
        tokens = torch.tensor([words(prompt, truncation=True, max_length=12)["input_ids"]])
        with torch.no_grad():
            a = model.visual_projection(model.vision_model(pixel_values=x[None]).pooler_output)
            b = model.text_projection(model.text_model(input_ids=tokens).last_hidden_state[:, tokens[0].tolist().index(53)])
        expected.append(100 * cosine_similarity(a, b))
    torch.testing.assert_close(net(images, PROMPTS).float(), torch.cat(expected), atol=0.05, rtol=0)
    assert 5 < torch.cat(expected).abs().max() < 100
    with pytest.raises(ValueError, match="PickScore: 3 images and 1 prompts; they must be paired"):
        net(images, ["a"])


def dino(folder: Path, name: str) -> Any:
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    made = (
        ViTModel(ViTConfig(**shape, intermediate_size=32), add_pooling_layer=False)
        if name == "dino"
        else Dinov2Model(Dinov2Config(**shape))
    )
    model = randomised(made)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    sees(folder, "ViTFeatureExtractor" if name == "dino" else "BitImageProcessor", 16)
    return model


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_dino_is_the_class_token_from_a_folder_and_from_the_hub_s_cache(name: str, nowhere: Path, tmp_path: Path) -> None:
    repository = {"dino": "facebook/dino-vits16", "dinov2": "facebook/dinov2-large"}[name]
    kept = nowhere / f"models--{repository.replace('/', '--')}"
    model = dino(kept / "snapshots" / "abc", name)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    images = pictures(2)
    with torch.no_grad():
        expected = model((resized(images, 16) - MEAN) / STD).last_hidden_state[:, 0]
    given = f"{name}:{kept / 'snapshots' / 'abc'}"
    for net in (Networks(embed=name).load().embed, Networks(features=given).load().features):
        torch.testing.assert_close(net(images), expected, atol=5e-3, rtol=0)
    (tmp_path / "other").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "other" / "model.safetensors")
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / "other" / file).write_bytes((kept / "snapshots" / "abc" / file).read_bytes())
    with pytest.raises(ValueError, match=r"other holds no DINO.*: it lacks .* such weights") as error:
        Networks(embed=f"{name}:{tmp_path / 'other'}").load()
    assert "\n" not in str(error.value)


def test_what_a_network_sees_is_in_its_name(rewards: Path, tmp_path: Path) -> None:
    """Weights alone do not say what numbers they give: under another mean of the pixels, or other words, it is another network."""
    folder = tmp_path / "dino"
    dino(folder, "dinov2")

    def named() -> str | None:
        return Networks(embed=f"dinov2:{folder}").load().about()["embed"]

    before, file = named(), folder / "preprocessor_config.json"
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text) | {"image_mean": [0, 0, 0]}))
    after = named()
    assert before and after and before != after and before.partition(", its settings")[0] == after.partition(", its settings")[0]
    file.write_text(text)
    assert named() == before
    first, words = Networks(image_reward=f"image_reward:{rewards}"), rewards / "vocab.txt"
    told = first.load().about()["image_reward"]
    words.write_text(words.read_text() + "dog\n")
    assert first.load().about()["image_reward"] != told


def test_a_suite_measures_through_them(clip: tuple[Path, Any], tmp_path: Path) -> None:
    dino(tmp_path, "dinov2")
    nets = Networks(hps={"name": "hps", "path": str(clip[0]), "model": "ddil-tiny-clip"}, embed=f"dinov2:{tmp_path}").load()
    suite = Suite("mine", ["cat"] * 12, Given(nets), Probes(["cat"] * 2, 3), batch=5)
    found = suite.score(lambda prompts, seed: pictures(len(prompts), seed=seed))
    scores = torch.cat([nets.hps(as_saved(pictures(n, seed=i)), ["cat"] * n) for i, n in ((0, 5), (5, 5), (10, 2))])
    assert found["hps"] == pytest.approx(float(scores.mean()), abs=1e-6)
    low, high = found["intervals"]["hps"]
    assert low < found["hps"] < high and 1 < found["vendi"] <= 3 and found["feature_diversity"] > 0
    assert found["pickscore"] is found["image_reward"] is found["clip"] is None
    assert suite.protocol["networks"]["hps"].startswith("HPS v2.1, ddil-tiny-clip, ") and "pickscore" not in suite.protocol["networks"]


# ImageReward

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a red square and cat".split()]
MED = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 12,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 12,
    "encoder_width": 768,
    "add_cross_attention": True,
}
WIDTH, DEPTH = 128, 2


def checkpoint() -> dict[str, Tensor]:
    """Random weights by the names of ImageReward.pt, of a BLIP that reads 16 pixels in patches of 8."""
    shapes: dict[str, tuple[int, ...]] = {"visual_encoder.cls_token": (1, 1, WIDTH), "visual_encoder.pos_embed": (1, 5, WIDTH)}

    def layer(name: str, n: int, m: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (m, n), (m,)

    def norm(name: str, n: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n,), (n,)

    shapes |= {"visual_encoder.patch_embed.proj.weight": (WIDTH, 3, 8, 8), "visual_encoder.patch_embed.proj.bias": (WIDTH,)}
    for i in range(DEPTH):
        block = f"visual_encoder.blocks.{i}"
        norm(f"{block}.norm1", WIDTH), norm(f"{block}.norm2", WIDTH)
        layer(f"{block}.attn.qkv", WIDTH, 3 * WIDTH), layer(f"{block}.attn.proj", WIDTH, WIDTH)
        layer(f"{block}.mlp.fc1", WIDTH, 4 * WIDTH), layer(f"{block}.mlp.fc2", 4 * WIDTH, WIDTH)
    norm("visual_encoder.norm", WIDTH), norm("text_encoder.embeddings.LayerNorm", 12)
    shapes |= {"text_encoder.embeddings.word_embeddings.weight": (12, 12), "text_encoder.embeddings.position_embeddings.weight": (40, 12)}
    for i in range(2):
        block = f"text_encoder.encoder.layer.{i}"
        for part, source in (("attention", 12), ("crossattention", WIDTH)):
            layer(f"{block}.{part}.self.query", 12, 12)
            layer(f"{block}.{part}.self.key", source, 12), layer(f"{block}.{part}.self.value", source, 12)
            layer(f"{block}.{part}.output.dense", 12, 12), norm(f"{block}.{part}.output.LayerNorm", 12)
        layer(f"{block}.intermediate.dense", 12, 20), layer(f"{block}.output.dense", 20, 12), norm(f"{block}.output.LayerNorm", 12)
    layer("vision_proj", WIDTH, 4), layer("text_proj", 12, 4)
    found = {f"blip.{key}": shape for key, shape in shapes.items()}
    shapes.clear()
    for i, n, m in ((0, 12, 10), (2, 10, 8), (4, 8, 6), (6, 6, 4), (7, 4, 1)):
        layer(f"mlp.layers.{i}", n, m)
    rng = torch.Generator().manual_seed(1)
    made = {
        key: torch.randn(shape, generator=rng) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3) for key, shape in (found | shapes).items()
    }
    return made | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def written_out(w: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """The score by the authors' names of the weights: BLIP's vision transformer, its text encoder in `multimodal` mode, the head."""

    def dense(name: str, x: Tensor) -> Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    patches = torch.nn.functional.conv2d(pixels, w[f"{v}.patch_embed.proj.weight"], w[f"{v}.patch_embed.proj.bias"], 8).flatten(2).mT
    x = torch.cat([w[f"{v}.cls_token"].expand(len(pixels), -1, -1), patches], 1) + w[f"{v}.pos_embed"]
    for i in range(DEPTH):
        q, k, value = dense(f"{v}.blocks.{i}.attn.qkv", norm(f"{v}.blocks.{i}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + dense(f"{v}.blocks.{i}.attn.proj", attend(q, k, value, WIDTH // 64))
        x = x + dense(f"{v}.blocks.{i}.mlp.fc2", gelu(dense(f"{v}.blocks.{i}.mlp.fc1", norm(f"{v}.blocks.{i}.norm2", x, 1e-6))))
    image = norm(f"{v}.norm", x, 1e-6)
    x = w[f"{t}.embeddings.word_embeddings.weight"][tokens] + w[f"{t}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = norm(f"{t}.embeddings.LayerNorm", x, 1e-12)
    for i in range(2):
        block = f"{t}.encoder.layer.{i}"
        for part, source, hidden in (("attention", None, mask), ("crossattention", image, None)):
            source = x if source is None else source
            parts = (dense(f"{block}.{part}.self.{name}", y) for name, y in (("query", x), ("key", source), ("value", source)))
            x = norm(f"{block}.{part}.output.LayerNorm", x + dense(f"{block}.{part}.output.dense", attend(*parts, 3, hidden)), 1e-12)
        x = norm(f"{block}.output.LayerNorm", x + dense(f"{block}.output.dense", gelu(dense(f"{block}.intermediate.dense", x))), 1e-12)
    x = x[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = dense(f"mlp.layers.{i}", x)
    return (x[:, 0].double() - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    """A folder as a user makes it: the authors' two files and BERT's vocabulary."""
    torch.save(checkpoint(), tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return tmp_path


def test_image_reward_is_the_authors_forward(rewards: Path) -> None:
    images, number = pictures(3), {word: i for i, word in enumerate(VOCABULARY)}
    tokens = torch.zeros(3, 35, dtype=torch.long)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        ids = [number[word] for word in ["[CLS]", *prompt.lower().split(), "[SEP]"]]
        row[: len(ids)] = torch.tensor(ids)
    expected = written_out(checkpoint(), (resized(images, 16) - MEAN) / STD, tokens, tokens > 0)
    assert expected.std() > 0.01
    for place in (rewards, rewards / "ImageReward.pt"):
        found = Networks(image_reward=f"image_reward:{place}").load().image_reward(images, PROMPTS)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    alone = Networks(image_reward=f"image_reward:{rewards}").load().image_reward(images[1:2], PROMPTS[1:2])
    torch.testing.assert_close(alone, expected[1:2], atol=1e-6, rtol=0)


def test_what_is_no_image_reward(rewards: Path) -> None:
    short = {key: value for key, value in checkpoint().items() if "crossattention" not in key}
    torch.save(short, rewards / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"holds no weights of ImageReward: it lacks text\.encoder\.layer\.0\.crossattention"):
        Networks(image_reward=f"image_reward:{rewards}").load()
    torch.save({"a": torch.ones(1)}, rewards / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"ImageReward\.pt and med_config\.json hold no ImageReward: it has no vision\.embeddings"):
        Networks(image_reward=f"image_reward:{rewards}").load()
    (rewards / "med_config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no med_config\.json"):
        Networks(image_reward=f"image_reward:{rewards}").load()


# LPIPS, Inception


@pytest.mark.slow
def test_lpips_from_a_file_of_its_trunk(tmp_path: Path) -> None:
    """By hand: AlexNet's five maps, of unit length over channels, their squared differences weighted by the package's learned numbers."""
    import torchvision

    net = randomised(torchvision.models.alexnet(weights=None).features)
    torch.save({f"features.{k}": v for k, v in net.state_dict().items()} | {"classifier.6.bias": torch.ones(2)}, tmp_path / "alex.pth")
    distance = Networks(distance=f"lpips:{tmp_path / 'alex.pth'}").load().distance
    a, b = pictures(2, 64), pictures(2, 64, seed=1)
    import lpips

    learned = torch.load(Path(lpips.__file__).parent / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True)
    shift, scale = (torch.tensor(x)[:, None, None] for x in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    expected, x, y = torch.zeros(2), (a - shift) / scale, (b - shift) / scale
    with torch.no_grad():
        for i, layer in enumerate(net):
            x, y = layer(x), layer(y)
            if i in (1, 4, 7, 9, 11):
                unit = [z / (z.norm(dim=1, keepdim=True) + 1e-10) for z in (x, y)]
                weight = learned[f"lin{(1, 4, 7, 9, 11).index(i)}.model.1.weight"]
                expected += ((unit[0] - unit[1]).square() * weight).sum(1).mean((1, 2))
    torch.testing.assert_close(distance(a, b), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(distance(a, a), torch.zeros(2)) and expected.min() > 0.01
    with pytest.raises(ValueError, match=r"alex\.pth holds no weights of LPIPS's trunk squeeze: it "):
        lpips_file.lpips_distance("squeeze", trunk=str(tmp_path / "alex.pth"))
    save_file(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeeze.safetensors")
    squeeze = lpips_file.lpips_distance("squeeze", trunk=str(tmp_path / "squeeze.safetensors"))
    assert torch.equal(squeeze(a, a), torch.zeros(2)) and squeeze(a, b).min() > 0


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module]:
    """torch-fidelity's extractor with random weights, and their file, in a format that it does not read by itself."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    extractor = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as without:
        without.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        without.setattr(extractor, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        net = extractor("inception-v3-compat", ["2048"]).eval()
    for p in (p for p in net.parameters() if p.ndim == 4):  # else nothing of an image is left behind so many layers
        nn.init.kaiming_normal_(p, nonlinearity="relu")
    save_file(net.state_dict(), tmp_path / "inception.safetensors")
    return tmp_path / "inception.safetensors", net


@pytest.mark.slow
def test_inception_is_torch_fidelity_s_own_extractor(inception: tuple[Path, nn.Module]) -> None:
    file, net = inception
    images = pictures(1, 40)
    with torch.no_grad():
        expected = net(((images + 1) * 127.5).round().byte())[0].flatten(1)
    assert expected.std() > 0.01
    torch.testing.assert_close(Networks(f"inception:{file}").load().features(images), expected)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"inception\.safetensors holds no weights of Inception-v3") as error:
        Networks(f"inception_clean_fid:{file}").load()
    assert "\n" not in str(error.value)


def test_clean_fid_s_inception_is_the_same_network_where_nothing_is_resized(inception: tuple[Path, nn.Module]) -> None:
    """At 299 pixels both resizes are the identity."""
    file, _ = inception
    own, clean = (Networks(f"{name}:{file}").load().features(pictures(1, 299)) for name in ("inception", "inception_clean_fid"))
    assert own.shape == (1, 2048) and own.std() > 0.01
    torch.testing.assert_close(clean, own)
