"""Keep a trained readout, or its generative twin, in a folder, and load it again.

The folder holds only what was trained, a standard PEFT adapter and the head, and says
which backbone that belongs to.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from mmsa_lib.corpora.media import MediaConfig
from mmsa_lib.errors import ConfigError
from mmsa_lib.files import replacing, sha256_of, write_atomic
from mmsa_lib.methods.generative import Generative
from mmsa_lib.methods.readout import Readout, ReadoutConfig, attach_lora
from mmsa_lib.nets import omni
from mmsa_lib.nets.trained import copied, trained_state

KINDS = {"readout": Readout, "generative": Generative}
SETTINGS, HEAD = "readout.json", "regressor.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def save(
    model: Readout | Generative,
    folder: str | Path,
    *,
    backbone: str,
    media: MediaConfig,
) -> Path:
    """Write the trained parts: a standard PEFT adapter, the head, the settings.

    folder/adapter_config.json, adapter_model.safetensors   load with peft alone
    folder/regressor.safetensors   head, pooling and label scaler
    folder/readout.json            configuration, backbone, its fingerprint, how clips
                                   are read, and the sha256 of the other parts

    The twin has no head: its regressor.safetensors holds the scaler only.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    peft = model.body.model
    name = "default"
    peft.peft_config[name].base_model_name_or_path = backbone
    # the vocabulary is as it was: peft need not look for that on the hub
    peft.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template
    trained = copied(trained_state(model))
    parts = {k: v for k, v in trained.items() if not k.startswith("body.")}
    with replacing(folder / HEAD) as part:
        save_file(parts, part)
    settings = {
        "kind": type(model).__name__.lower(),
        "backbone": backbone,
        "backbone_sha256": omni.fingerprint(model.body),
        "readout": asdict(model.config),
        "media": asdict(media),
        "modalities": list(model.body.modalities),
        "sha256": {part: sha256_of(folder / part) for part in (*ADAPTER, HEAD)},
    }
    write_atomic(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    return folder


def load(
    folder: str | Path,
    *,
    backbone: str | Path | None = None,
    quantise: bool = True,
    device: str = "auto",
) -> tuple[Readout | Generative, MediaConfig]:
    """A saved readout (or twin) on its backbone, in eval mode; how its clips are read.

    backbone: another place of the same model than the one that was saved, such as a
    local folder. Raises `ConfigError` when a part is missing, damaged or does not fit.
    """
    folder = Path(folder)
    lacking = [n for n in (SETTINGS, HEAD, *ADAPTER) if not (folder / n).is_file()]
    if lacking:
        raise ConfigError(
            f"{folder} holds no readout: {', '.join(lacking)} missing. "
            "mmsa-book train or methods.saving.save write one."
        )
    try:
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
        damaged = [
            n for n, d in settings["sha256"].items() if sha256_of(folder / n) != d
        ]
        kept = settings["readout"]
        config = ReadoutConfig(**(kept | {"suffixes": tuple(kept["suffixes"])}))
        media = MediaConfig(**settings["media"])
        kind = KINDS[settings["kind"]]
        source, modalities = backbone or settings["backbone"], settings["modalities"]
        trained_on = settings["backbone_sha256"]
        named = json.loads((folder / ADAPTER[0]).read_text("utf-8"))
        base = named["base_model_name_or_path"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{folder / SETTINGS} is damaged or of another version "
            f"({type(error).__name__}: {error}); save the readout again"
        ) from error
    if damaged:
        raise ConfigError(
            f"{', '.join(damaged)} in {folder}: not what was saved there, but damaged "
            "or of another readout. Copy or save the whole folder again."
        )
    if base != settings["backbone"]:
        raise ConfigError(
            f"{folder / ADAPTER[0]} names the base {base!r}, but {SETTINGS} records "
            f"{settings['backbone']!r}: the parts are of two models. Save it again."
        )
    thinker = omni.load(source, quantise=quantise, device=device, modalities=modalities)
    if omni.fingerprint(thinker) != trained_on:
        raise ConfigError(
            f"{folder} was not made for the backbone {source}: the weights there are "
            "not those that it was trained on. Name the right ones, or train it again "
            "(mmsa-book train)."
        )
    from peft import set_peft_model_state_dict  # after `load`, which keeps it quiet

    try:
        # the layers are those of our own settings: adapter_config.json could name
        # modules to import, so nothing else of it is read
        thinker.model = attach_lora(thinker.model, config)
        weights = load_file(folder / ADAPTER[1])
        fitted = set_peft_model_state_dict(thinker.model, weights)
        lora = [k for k in fitted.missing_keys if "lora_" in k]
        if lora or fitted.unexpected_keys:
            raise ValueError(f"{ADAPTER[1]}: {lora + fitted.unexpected_keys}")
        model = kind(thinker, config)
        found = model.load_state_dict(load_file(folder / HEAD), strict=False)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{folder} was not made for the backbone {source}: {error}"
        ) from error
    wrong = [k for k in found.missing_keys if not k.startswith("body.")]
    wrong += found.unexpected_keys
    if wrong:
        raise ConfigError(f"{folder / HEAD} does not fit {SETTINGS}: {wrong}")
    for name, part in model.named_children():
        if name != "body":  # which is there, and 4-bit weights bear no second move
            part.to(thinker.device)
    return model.eval(), media
