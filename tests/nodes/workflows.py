"""The example workflows: described once, written as API JSON and as the UI JSON that ComfyUI's front end opens.

`python tests/nodes/workflows.py` rewrites ``example_workflows/``; a test keeps the files equal to what it would write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor import NATIVE_NODES, is_link, topological_order
from flux2_kit import NODE_CLASS_MAPPINGS
from flux2_kit.flux2_core.variants import MISTRAL_SMALL, QWEN3_4B, QWEN3_8B, VARIANTS, TextEncoderConfig
from flux2_kit.flux2_core.weights import AUTOENCODER_NAMES, TEXT_ENCODER_NAMES
from flux2_kit.nodes.host import BUNDLED
from flux2_kit.training.tiny.styles import STYLE

FOLDER = Path(__file__).parents[2] / "example_workflows"
NODE_CLASSES: dict[str, Any] = {**NATIVE_NODES, **NODE_CLASS_MAPPINGS}
HUGGING_FACE = "https://huggingface.co"

TITLE_HEIGHT = 30
SLOT_HEIGHT = 20
WIDGET_HEIGHT = 28
TEXT_HEIGHT = 100
PICTURE_SIDE = 320
LINE_HEIGHT = 40
TABLE_HEIGHT = 260
PREVIEW_HEIGHT = 224
"""Of a line of text and a live preview below the widgets."""
GAP = 50
GROUP_MARGIN = 20
WIDTHS = {
    "Flux2KitLoadDiT": 360,
    "Flux2KitLoadAE": 360,
    "Flux2KitLoadTextEncoder": 360,
    "Flux2KitEncodePrompt": 400,
    "Flux2KitEncodeReference": 300,
    "Flux2KitSample": 320,
    "Flux2KitDecode": 240,
    "Flux2KitCacheDataset": 420,
    "Flux2KitTrainLoRA": 460,
    "Flux2KitApplyLoRA": 320,
    "Flux2KitPromptJSON": 420,
}


@dataclass
class Workflow:
    """Nodes in columns from left to right."""

    api: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: list[tuple[str, list[str]]] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    """What ComfyUI offers to download when a node's file is missing."""
    note: str = ""
    note_title: str = "Where the files come from"

    def column(self, title: str) -> None:
        self.columns.append((title, []))

    def add(self, class_type: str, title: str = "", **inputs: Any) -> Link:
        """Adds a node to the last column; a widget that is not named takes its default, a link is another node."""
        schema = NODE_CLASSES[class_type].INPUT_TYPES()
        values: dict[str, Any] = {}
        for name, (kind, *rest) in {**schema.get("required", {}), **schema.get("optional", {})}.items():
            if name in inputs:
                value = inputs.pop(name)
                values[name] = value.api if isinstance(value, Link) else value
            elif is_widget(kind):
                values[name] = rest[0].get("default", kind[0] if isinstance(kind, list) else None)
        assert not inputs, f"{class_type} has no inputs {list(inputs)}"
        node_id = str(len(self.api) + 1)
        self.api[node_id] = {"class_type": class_type, "inputs": values}
        if title:
            self.titles[node_id] = title
        self.columns[-1][1].append(node_id)
        return Link(node_id)


@dataclass(frozen=True)
class Link:
    """An output of a node."""

    node_id: str
    slot: int = 0

    @property
    def api(self) -> list[Any]:
        return [self.node_id, self.slot]

    def output(self, slot: int) -> Link:
        return Link(self.node_id, slot)


def text_to_image_tiny() -> Workflow:
    flow = Workflow()
    flow.column("1. Models")
    dit, text_encoder, ae = add_loaders(flow, BUNDLED, BUNDLED, BUNDLED)
    flow.column("2. Prompt")
    prompt = "a large red circle at the top left on a blue background"
    positive = flow.add("Flux2KitEncodePrompt", "Prompt", text_encoder=text_encoder, prompt=prompt)
    negative = flow.add("Flux2KitEncodePrompt", "Negative prompt", text_encoder=text_encoder)
    flow.column("3. Sample")
    latent = flow.add("Flux2KitSample", dit=dit, positive=positive, negative=negative, ae=ae, num_images=4)
    add_result(flow, ae, latent, "flux2_kit/tiny")
    return flow


def reference_edit_tiny() -> Workflow:
    flow = Workflow()
    flow.column("1. Models")
    dit, text_encoder, ae = add_loaders(flow, BUNDLED, BUNDLED, BUNDLED)
    flow.column("2. Prompts")
    prompt = "a large red circle at the left on a yellow background"
    first = flow.add("Flux2KitEncodePrompt", "Picture to start from", text_encoder=text_encoder, prompt=prompt)
    edit = flow.add("Flux2KitEncodePrompt", "Edit", text_encoder=text_encoder, prompt="make the circle green")
    negative = flow.add("Flux2KitEncodePrompt", "Negative prompt", text_encoder=text_encoder)
    flow.column("3. Picture to start from")
    latent = flow.add("Flux2KitSample", dit=dit, positive=first, negative=negative, ae=ae)
    flow.column("4. Reference")
    image = flow.add("Flux2KitDecode", ae=ae, latent=latent)
    flow.add("PreviewImage", images=image)
    references = flow.add("Flux2KitEncodeReference", ae=ae, image=image)
    flow.column("5. Edit")
    latent = flow.add("Flux2KitSample", dit=dit, positive=edit, negative=negative, references=references, ae=ae, seed=1)
    add_result(flow, ae, latent, "flux2_kit/tiny_edit", number=6)
    return flow


def image_to_image_tiny() -> Workflow:
    flow = Workflow()
    flow.note_title = "What this shows"
    flow.note = (
        "Two ways to go on from a picture. Below *denoise* 1 all of it is changed, the more the higher it is. With a "
        "mask only its white part is made anew.\n\n"
        "For a picture of your own put *Load Image* in place of FLUX.2 Decode, and paint the mask in its mask editor "
        "(right-click)."
    )
    flow.column("1. Models")
    dit, text_encoder, ae = add_loaders(flow, BUNDLED, BUNDLED, BUNDLED)
    flow.column("2. Prompts")
    prompts = (
        ("Picture to start from", "a large red circle at the left on a yellow background"),
        ("All of it", "a large green circle at the left on a yellow background"),
        ("Inside of the mask", "a large blue star at the left on a yellow background"),
        ("Negative prompt", ""),
    )
    first, whole, inside, negative = (
        flow.add("Flux2KitEncodePrompt", title, text_encoder=text_encoder, prompt=prompt) for title, prompt in prompts
    )
    flow.column("3. Picture to start from")
    latent = flow.add("Flux2KitSample", dit=dit, positive=first, negative=negative, ae=ae)
    image = flow.add("Flux2KitDecode", ae=ae, latent=latent)
    flow.add("PreviewImage", images=image)
    flow.column("4. Mask")
    black = flow.add("SolidMask", "What stays", value=0.0, width=64, height=64)
    white = flow.add("SolidMask", "What is made anew", value=1.0, width=48, height=64)
    mask = flow.add("MaskComposite", destination=black, source=white, operation="add")
    flow.column("5. Encode")
    encoded = flow.add("Flux2KitEncodeImage", "Picture", ae=ae, image=image)
    masked = flow.add("Flux2KitEncodeImage", "Picture with a mask", ae=ae, image=image, mask=mask)
    for number, title, positive, start, denoise in (
        (6, "Image to image", whole, encoded, 0.6),
        (7, "Inpainting", inside, masked, 1.0),
    ):
        flow.column(f"{number}. {title}")
        latent = flow.add(
            "Flux2KitSample",
            dit=dit,
            positive=positive,
            negative=negative,
            ae=ae,
            latent=start,
            denoise=denoise,
            seed=1,
        )
        result = flow.add("Flux2KitDecode", ae=ae, latent=latent)
        prefix = f"flux2_kit/tiny_{title.lower().replace(' ', '_')}"
        flow.add("SaveImage", title, images=result, filename_prefix=prefix)
    return flow


def train_lora_tiny() -> Workflow:
    prompt = f"{STYLE}, a large red circle at the top left on a blue background"
    flow = Workflow()
    flow.note_title = "With pictures of your own"
    flow.note = (
        "1. Put a folder of pictures into `input`, each with its caption in a text file of the same name. Write the "
        "folder's name into *dataset*.\n"
        "2. Choose AE and text encoder there, and the DiT in *FLUX.2 Train LoRA*: dev, klein-base-4b or klein-base-9b. "
        "Load the same files, or the distilled klein, in *4. Models*.\n"
        "3. *learning_rate* 0 and *max_train_steps* 1000 to 2000 are a good start. Write sample prompts and watch.\n\n"
        "The stop button keeps what is trained: queue again, and it goes on."
    )
    flow.column("1. Dataset")
    dataset = flow.add("Flux2KitCacheDataset")
    flow.column("2. Train")
    trained = flow.add(
        "Flux2KitTrainLoRA",
        dataset=dataset,
        output_name="tiny_style",
        max_train_steps=100,
        learning_rate=1e-3,
        sample_every_n_steps=25,
        sample_prompts=f"{prompt} --d 1\n{STYLE}, a small green square at the center on a white background --d 2",
    )
    flow.column("3. Loss and samples")
    flow.add("PreviewImage", "Loss", images=trained.output(2))
    flow.add("PreviewImage", "Last samples", images=trained.output(3))
    flow.column("4. Models")
    dit, text_encoder, ae = add_loaders(flow, BUNDLED, BUNDLED, BUNDLED)
    adapted = flow.add("Flux2KitApplyLoRA", dit=dit, lora=trained)
    flow.column("5. Prompt")
    positive = flow.add("Flux2KitEncodePrompt", "Prompt", text_encoder=text_encoder, prompt=prompt)
    negative = flow.add("Flux2KitEncodePrompt", "Negative prompt", text_encoder=text_encoder)
    for number, title, network in ((6, "Before", dit), (7, "After", adapted)):
        flow.column(f"{number}. {title}")
        latent = flow.add("Flux2KitSample", dit=network, positive=positive, negative=negative, ae=ae, num_images=4)
        image = flow.add("Flux2KitDecode", ae=ae, latent=latent)
        flow.add("SaveImage", title, images=image, filename_prefix=f"flux2_kit/tiny_style_{title.lower()}")
    return flow


def multi_reference_edit_tiny() -> Workflow:
    flow = Workflow()
    flow.column("1. Models")
    dit, text_encoder, ae = add_loaders(flow, BUNDLED, BUNDLED, BUNDLED)
    flow.column("2. Prompts")
    prompts = (
        ("Picture 1", "a large red star at the left on a white background"),
        ("Picture 2", "a large blue square at the center on a yellow background"),
        ("Edit", "the shape of image 1 in the colour of image 2"),
        ("Negative prompt", ""),
    )
    first, second, edit, negative = (
        flow.add("Flux2KitEncodePrompt", title, text_encoder=text_encoder, prompt=prompt) for title, prompt in prompts
    )
    flow.column("3. Pictures to start from")
    latents = [
        flow.add("Flux2KitSample", f"Picture {number}", dit=dit, positive=positive, negative=negative, seed=number)
        for number, positive in ((1, first), (2, second))
    ]
    flow.column("4. Decode")
    images = [flow.add("Flux2KitDecode", ae=ae, latent=latent) for latent in latents]
    for number, image in enumerate(images, start=1):
        flow.add("PreviewImage", f"Picture {number}", images=image)
    flow.column("5. References")
    references = flow.add("Flux2KitEncodeReference", "image 1", ae=ae, image=images[0])
    references = flow.add("Flux2KitEncodeReference", "image 2", ae=ae, image=images[1], references=references)
    flow.column("6. Edit")
    latent = flow.add("Flux2KitSample", dit=dit, positive=edit, negative=negative, references=references, ae=ae, seed=3)
    add_result(flow, ae, latent, "flux2_kit/tiny_multi_edit", number=7)
    return flow


def lora_stack_tiny() -> Workflow:
    prompt = f"{STYLE}, a large red circle at the top left on a blue background"
    flow = Workflow()
    flow.column("1. Models")
    dit, text_encoder, ae = add_loaders(flow, BUNDLED, BUNDLED, BUNDLED)
    flow.note_title = "Which LoRAs"
    flow.note = (
        "Choose files of `models/loras` in the three nodes; `none` leaves the DiT as it is. The order does not "
        "matter.\n\nThe workflow *train_lora_tiny* makes a LoRA for this model. For your own LoRAs choose the model "
        "that they were trained on: DiT, text encoder and AE."
    )
    flow.column("2. LoRAs")
    adapted = dit
    for number, strength in ((1, 1.0), (2, 0.8), (3, 0.5)):
        adapted = flow.add("Flux2KitApplyLoRA", f"LoRA {number}", dit=adapted, strength=strength)
    flow.column("3. Prompt")
    positive = flow.add("Flux2KitEncodePrompt", "Prompt", text_encoder=text_encoder, prompt=prompt)
    negative = flow.add("Flux2KitEncodePrompt", "Negative prompt", text_encoder=text_encoder)
    for number, title, network in ((4, "Without", dit), (5, "With all LoRAs", adapted)):
        flow.column(f"{number}. {title}")
        latent = flow.add("Flux2KitSample", dit=network, positive=positive, negative=negative, ae=ae)
        image = flow.add("Flux2KitDecode", ae=ae, latent=latent)
        prefix = f"flux2_kit/tiny_stack_{title.split()[0].lower()}"
        flow.add("SaveImage", title, images=image, filename_prefix=prefix)
    return flow


def native_sampler_tiny() -> Workflow:
    flow = Workflow()
    flow.note_title = "What this shows"
    flow.note = (
        "Three bridges give the networks of this pack to native nodes, here to both native ways to sample. With euler "
        "and the noise schedule of FLUX.2 both make the picture of FLUX.2 Sample for the same seed.\n\n"
        "KSampler takes its schedule from the MODEL: scheduler *simple*, and the number of steps of FLUX.2 to MODEL."
    )
    flow.column("1. Models")
    dit, text_encoder, ae = add_loaders(flow, BUNDLED, BUNDLED, BUNDLED)
    flow.column("2. Bridges to native nodes")
    model = flow.add("Flux2KitToModel", dit=dit)
    clip = flow.add("Flux2KitToCLIP", text_encoder=text_encoder)
    vae = flow.add("Flux2KitToVAE", ae=ae)
    flow.column("3. Prompts and size")
    prompt = "a large green triangle at the right on a white background"
    positive = flow.add("CLIPTextEncode", "Prompt", clip=clip, text=prompt)
    negative = flow.add("CLIPTextEncode", "Negative prompt", clip=clip)
    latent = flow.add("Flux2KitEmptyLatent", "Size", aspect_ratio="custom", width=64, height=64)
    prompts: dict[str, Any] = {"model": model, "positive": positive, "negative": negative, "cfg": 4.0}
    flow.column("4. KSampler")
    sampled = flow.add("KSampler", latent_image=latent, seed=3, steps=20, **prompts)
    image = flow.add("VAEDecode", samples=sampled, vae=vae)
    flow.add("SaveImage", "KSampler", images=image, filename_prefix="flux2_kit/tiny_ksampler")
    flow.column("5. Parts of the other way")
    parts: dict[str, Any] = {
        "sigmas": flow.add("Flux2KitSigmas", dit=dit),
        "noise": flow.add("RandomNoise", noise_seed=3),
        "guider": flow.add("CFGGuider", **prompts),
        "sampler": flow.add("KSamplerSelect"),
    }
    flow.column("6. SamplerCustomAdvanced")
    sampled = flow.add("SamplerCustomAdvanced", latent_image=latent, **parts)
    image = flow.add("VAEDecode", samples=sampled, vae=vae)
    flow.add("SaveImage", "SamplerCustomAdvanced", images=image, filename_prefix="flux2_kit/tiny_custom_sampler")
    return flow


def text_to_image_klein_4b() -> Workflow:
    flow = Workflow()
    flow.column("1. Models")
    dit, text_encoder, ae = add_released(flow, "klein-4b", QWEN3_4B, "Flux-2-Klein-4B")
    flow.column("2. Prompt")
    prompt = "A red fox asleep in fresh snow under a pine, soft morning light, photograph"
    positive = flow.add("Flux2KitEncodePrompt", "Prompt", text_encoder=text_encoder, prompt=prompt)
    flow.column("3. Sample")
    latent = flow.add("Flux2KitSample", dit=dit, positive=positive, ae=ae)
    add_result(flow, ae, latent, "flux2_kit/klein-4b")
    return flow


def text_to_image_klein_base_9b() -> Workflow:
    flow = Workflow()
    flow.column("1. Models")
    repository = "vae-text-encorder-for-flux-klein-9b"
    dit, text_encoder, ae = add_released(flow, "klein-base-9b", QWEN3_8B, repository)
    flow.column("2. Prompts and size")
    prompt = "A glass greenhouse at night, lit from inside, fog between tall ferns, wide shot, photograph"
    positive = flow.add("Flux2KitEncodePrompt", "Prompt", text_encoder=text_encoder, prompt=prompt)
    negative = flow.add("Flux2KitEncodePrompt", "Negative prompt", text_encoder=text_encoder)
    size = flow.add("Flux2KitEmptyLatent", "Size", aspect_ratio="3:2")
    flow.column("3. Sample")
    latent = flow.add("Flux2KitSample", dit=dit, positive=positive, negative=negative, ae=ae, latent=size)
    add_result(flow, ae, latent, "flux2_kit/klein-base-9b")
    return flow


def low_vram_klein_9b() -> Workflow:
    flow = Workflow()
    flow.column("1. Models")
    repository = "vae-text-encorder-for-flux-klein-9b"
    dit, text_encoder, ae = add_released(flow, "klein-9b", QWEN3_8B, repository)
    for link in (dit, text_encoder):
        flow.api[link.node_id]["inputs"] |= {"precision": "fp8", "vram_budget": 8.0}
    flow.note += (
        "\n\n*vram_budget* is what a loader may take of the GPU, in GiB: blocks that do not fit into it are streamed "
        "from host memory; 0 takes what is free. *precision* fp8 halves the weights; nf4 quarters them, and needs "
        "bitsandbytes. *tiling* decodes in strips."
    )
    flow.column("2. Prompt")
    prompt = "A wooden rowing boat on a still mountain lake at dawn, mist over the water, photograph"
    positive = flow.add("Flux2KitEncodePrompt", "Prompt", text_encoder=text_encoder, prompt=prompt)
    flow.column("3. Sample")
    latent = flow.add("Flux2KitSample", dit=dit, positive=positive, ae=ae)
    flow.column("4. Picture")
    image = flow.add("Flux2KitDecode", ae=ae, latent=latent, tiling=True)
    flow.add("SaveImage", images=image, filename_prefix="flux2_kit/klein-9b")
    return flow


def text_to_image_dev() -> Workflow:
    dit_name, text_encoder_name = "flux2_dev_fp8mixed.safetensors", TEXT_ENCODER_NAMES[MISTRAL_SMALL][0]
    repository = f"{HUGGING_FACE}/Comfy-Org/flux2-dev/resolve/main/split_files"
    flow = Workflow()
    flow.column("1. Models")
    urls = (
        f"{repository}/diffusion_models/{dit_name}",
        f"{repository}/text_encoders/{text_encoder_name}",
        f"{repository}/vae/{AUTOENCODER_NAMES[0]}",
    )
    dit, text_encoder, ae = add_loaders(flow, dit_name, text_encoder_name, AUTOENCODER_NAMES[0], "dev", urls)
    flow.column("2. Structured prompt")
    prompt = flow.add(
        "Flux2KitPromptJSON",
        scene="A small shop window at dusk in the rain",
        subjects='a neon sign that reads "OPEN LATE" / upper middle of the window / glowing\n'
        "a grey cat / on the sill behind the glass / asleep",
        style="photograph",
        lighting="neon light, reflections on wet pavement",
        mood="quiet",
        camera_lens="35 mm",
        num_colors=3,
        color_1="#0b1d3a",
        color_2="#ff3864",
        color_3="#f6c453",
    )
    flow.column("3. Encode")
    positive = flow.add("Flux2KitEncodePrompt", "Prompt", text_encoder=text_encoder, prompt=prompt)
    size = flow.add("Flux2KitEmptyLatent", "Size", aspect_ratio="4:3")
    flow.column("4. Sample")
    latent = flow.add("Flux2KitSample", dit=dit, positive=positive, ae=ae, latent=size)
    add_result(flow, ae, latent, "flux2_kit/dev", number=5)
    return flow


WORKFLOWS = {
    "text_to_image_tiny": text_to_image_tiny,
    "reference_edit_tiny": reference_edit_tiny,
    "image_to_image_tiny": image_to_image_tiny,
    "multi_reference_edit_tiny": multi_reference_edit_tiny,
    "lora_stack_tiny": lora_stack_tiny,
    "train_lora_tiny": train_lora_tiny,
    "native_sampler_tiny": native_sampler_tiny,
    "text_to_image_klein-4b": text_to_image_klein_4b,
    "text_to_image_klein-base-9b": text_to_image_klein_base_9b,
    "text_to_image_dev": text_to_image_dev,
    "low_vram_klein-9b": low_vram_klein_9b,
}


def add_loaders(
    flow: Workflow, dit: str, text_encoder: str, ae: str, variant: str = "auto", urls: tuple[str, ...] = ()
) -> tuple[Link, Link, Link]:
    links = (
        flow.add("Flux2KitLoadDiT", dit_name=dit, variant=variant),
        flow.add("Flux2KitLoadTextEncoder", text_encoder_name=text_encoder),
        flow.add("Flux2KitLoadAE", ae_name=ae),
    )
    folders = ("diffusion_models", "text_encoders", "vae")
    lines = []
    for link, folder, name, url in zip(links, folders, (dit, text_encoder, ae), urls, strict=bool(urls)):
        flow.models[link.node_id] = {"name": name, "url": url, "directory": folder}
        lines.append(f"- `models/{folder}`: [{name}]({url})")
    if lines:
        flow.note = "Files, in ComfyUI's folder:\n\n" + "\n".join(lines)
    return links


def add_released(
    flow: Workflow, name: str, text_encoder: TextEncoderConfig, repository: str
) -> tuple[Link, Link, Link]:
    """Loaders of a klein; its text encoder lies in a repository of Comfy-Org."""
    variant = VARIANTS[name]
    assert variant.dit_file is not None
    text_encoder_name = TEXT_ENCODER_NAMES[text_encoder][0]
    urls = (
        f"{HUGGING_FACE}/{variant.dit_file.repository}/resolve/main/{variant.dit_file.filename}",
        f"{HUGGING_FACE}/Comfy-Org/{repository}/resolve/main/split_files/text_encoders/{text_encoder_name}",
        f"{HUGGING_FACE}/Comfy-Org/flux2-dev/resolve/main/split_files/vae/{AUTOENCODER_NAMES[0]}",
    )
    return add_loaders(flow, variant.dit_file.filename, text_encoder_name, AUTOENCODER_NAMES[0], name, urls)


def add_result(flow: Workflow, ae: Link, latent: Link, prefix: str, number: int = 4) -> None:
    flow.column(f"{number}. Picture")
    image = flow.add("Flux2KitDecode", ae=ae, latent=latent)
    flow.add("SaveImage", images=image, filename_prefix=prefix)


def to_ui(flow: Workflow) -> dict[str, Any]:
    """The front end's format: nodes with places and sizes, and numbered links."""
    order = {node_id: index for index, node_id in enumerate(topological_order(flow.api))}
    places, groups = layout(flow)
    nodes: dict[str, dict[str, Any]] = {}
    for node_id, node in flow.api.items():
        node_class = NODE_CLASSES[node["class_type"]]
        nodes[node_id] = {
            "id": int(node_id),
            "type": node["class_type"],
            "pos": places[node_id][:2],
            "size": places[node_id][2:],
            "flags": {},
            "order": order[node_id],
            "mode": 0,
            "inputs": [
                {"name": name, "type": kind, **({"shape": 7} if optional else {}), "link": None}
                for name, kind, optional in sockets(node_class)
            ]
            + [
                {"name": name, "type": kind, "widget": {"name": name}, "link": None}
                for name, kind in linked_widgets(node_class, node["inputs"])
            ],
            "outputs": [
                {"name": name, "type": kind, "links": [], "slot_index": slot}
                for slot, (name, kind) in enumerate(zip(node_class.RETURN_NAMES, node_class.RETURN_TYPES, strict=True))
            ],
            "properties": {"Node name for S&R": node["class_type"]},
            "widgets_values": widget_values(node_class, node["inputs"]),
        }
        if node_id in flow.titles:
            nodes[node_id]["title"] = flow.titles[node_id]
        if node_id in flow.models:
            nodes[node_id]["properties"]["models"] = [flow.models[node_id]]
    links: list[list[Any]] = []
    for node_id, node in flow.api.items():
        for slot, entry in enumerate(nodes[node_id]["inputs"]):
            value = node["inputs"].get(entry["name"])
            if is_link(value):
                entry["link"] = len(links) + 1
                nodes[value[0]]["outputs"][value[1]]["links"].append(entry["link"])
                links.append([entry["link"], int(value[0]), value[1], int(node_id), slot, entry["type"]])
    shown = list(nodes.values())
    if flow.note:
        shown.append(note_node(flow, len(nodes) + 1, places["note"]))
    return {
        "last_node_id": len(shown),
        "last_link_id": len(links),
        "nodes": shown,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def note_node(flow: Workflow, node_id: int, place: list[int]) -> dict[str, Any]:
    """A note of the front end: it is not part of what the server runs."""
    return {
        "id": node_id,
        "type": "MarkdownNote",
        "pos": place[:2],
        "size": place[2:],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": flow.note_title,
        "properties": {},
        "widgets_values": [flow.note],
    }


def layout(flow: Workflow) -> tuple[dict[str, list[int]], list[dict[str, Any]]]:
    """[x, y, width, height] of every node, below its title bar, and a group around every column."""
    places: dict[str, list[int]] = {}
    groups: list[dict[str, Any]] = []
    x = 0
    for title, node_ids in flow.columns:
        width = max(node_size(flow.api[node_id])[0] for node_id in node_ids)
        y = 0
        for node_id in node_ids:
            height = node_size(flow.api[node_id])[1]
            places[node_id] = [x, y, width, height]
            y += height + TITLE_HEIGHT + GAP
        if not groups and flow.note:
            places["note"] = [x, y, width, 220]
            y += 220 + TITLE_HEIGHT + GAP
        top = -TITLE_HEIGHT - GROUP_MARGIN - TITLE_HEIGHT
        bottom = y - TITLE_HEIGHT - GAP + GROUP_MARGIN
        bounding = [x - GROUP_MARGIN, top, width + 2 * GROUP_MARGIN, bottom - top]
        groups.append(
            {
                "id": len(groups) + 1,
                "title": title,
                "bounding": bounding,
                "color": "#3f789e",
                "font_size": 22,
                "flags": {},
            }
        )
        x += width + 2 * GROUP_MARGIN + GAP
    return places, groups


def node_size(node: dict[str, Any]) -> tuple[int, int]:
    """Width and height without the title bar."""
    node_class = NODE_CLASSES[node["class_type"]]
    num_slots = max(len(sockets(node_class)), len(node_class.RETURN_TYPES))
    height = 16 + SLOT_HEIGHT * num_slots + WIDGET_HEIGHT * len(widget_values(node_class, node["inputs"]))
    height += TEXT_HEIGHT * num_texts(node_class)
    if hasattr(node_class, "OUTPUT_NODE"):
        height += PICTURE_SIDE
        if node["class_type"] == "Flux2KitCacheDataset":
            height += TABLE_HEIGHT
    elif "unique_id" in node_class.INPUT_TYPES().get("hidden", {}):
        # What a node shows while it runs makes it longer: it must not grow over the one below.
        height += LINE_HEIGHT + PREVIEW_HEIGHT * ("ae" in node["inputs"])
    return WIDTHS.get(node["class_type"], PICTURE_SIDE), height


def num_texts(node_class: Any) -> int:
    """Widgets of several lines."""
    schema = node_class.INPUT_TYPES()
    entries = {**schema.get("required", {}), **schema.get("optional", {})}.values()
    return sum(bool(rest and rest[0].get("multiline")) for _, *rest in entries)


def sockets(node_class: Any) -> list[tuple[str, str, bool]]:
    """(name, type, optional) of the inputs that are no widgets."""
    schema = node_class.INPUT_TYPES()
    return [
        (name, kind, category == "optional")
        for category in ("required", "optional")
        for name, (kind, *_) in schema.get(category, {}).items()
        if not is_widget(kind)
    ]


def linked_widgets(node_class: Any, inputs: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, type) of the widgets that take another node's output."""
    schema = node_class.INPUT_TYPES()
    entries = {**schema.get("required", {}), **schema.get("optional", {})}
    return [(name, kind) for name, (kind, *_) in entries.items() if is_widget(kind) and is_link(inputs[name])]


def widget_values(node_class: Any, inputs: dict[str, Any]) -> list[Any]:
    """In the order of the widgets; the front end adds one of its own after a seed, and a linked one keeps its value."""
    schema = node_class.INPUT_TYPES()
    values: list[Any] = []
    for name, (kind, *rest) in {**schema.get("required", {}), **schema.get("optional", {})}.items():
        if is_widget(kind):
            values.append(rest[0]["default"] if is_link(inputs[name]) else inputs[name])
            if rest and rest[0].get("control_after_generate"):
                values.append("fixed")
    return values


def is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN")


def written() -> dict[Path, str]:
    """Every file with its text."""
    files: dict[Path, str] = {}
    for name, describe in WORKFLOWS.items():
        flow = describe()
        files[FOLDER / f"{name}.json"] = json.dumps(to_ui(flow), indent=2) + "\n"
        files[FOLDER / "api" / f"{name}.json"] = json.dumps(flow.api, indent=2) + "\n"
    return files


if __name__ == "__main__":
    for path, text in written().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
