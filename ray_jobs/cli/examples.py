"""What `--help` of each command shows under Examples: lines of a shell, at most 76 characters wide."""

from rich.markup import escape

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": (
        "patternnet demo",
        "patternnet demo --out /tmp/demo --workers 0",
    ),
    "pack": (
        "patternnet pack photos/ shards/",
        "patternnet pack photos/ shards/ --per-shard 500 --crops 4 --size 224",
    ),
    "plan": (
        "patternnet plan --model torchvision:vgg16",
        "patternnet plan --model timm:resnet50 --weights random --memory 16G",
    ),
    "fit": (
        "patternnet fit --model torchvision:vgg16 --out runs/vgg16 \\\n"
        "    --shards '/data/imagenet-train-{0000..1023}.tar' --batch-size 64",
        "patternnet fit --model my_models.py:small --weights small.safetensors \\\n"
        "    --image-size 32 --resize 32 --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 \\\n"
        "    --shards 'shards/*.tar' --out runs/small --workers 0",
        "patternnet fit --model torchvision:resnet50 --out s3://bucket/resnet50 \\\n"
        "    --shards @shards.txt --until-converged 0.05 --positions auto",
    ),
    "merge": ("patternnet merge runs/january runs/february --out runs/both",),
    "status": (
        "patternnet status runs/vgg16",
        "patternnet status s3://bucket/resnet50",
    ),
    "solve": (
        "patternnet solve runs/vgg16 --estimators filter,multivariate",
        "patternnet solve runs/vgg16 \\\n    --estimators 'features.*=linear,classifier.*=two-component'",
    ),
    "quality": (
        "patternnet quality --patterns runs/vgg16 --shards '/data/val-{00..63}.tar'",
        "patternnet quality --patterns runs/vgg16 --operators 'features.*' \\\n"
        "    --shards '/data/val-{00..31}.tar' --evaluate '/data/val-{32..63}.tar'",
    ),
    "explain": (
        "patternnet explain --patterns runs/vgg16 --shards '/data/val-{00..63}.tar' \\\n"
        "    --methods patternnet,patternattribution",
        "patternnet explain --patterns runs/vgg16 --shards '/data/val-00.tar' \\\n"
        "    --target top-5 --output parquet --out runs/vgg16-top-5",
        "patternnet explain --patterns runs/vgg16 --shards 'shards/*.tar' \\\n"
        "    --methods smoothgrad,lrp --set smoothgrad.samples=50",
    ),
    "degrade": (
        "patternnet degrade --patterns runs/vgg16 --shards '/data/val-{00..63}.tar'",
        "patternnet degrade --patterns runs/vgg16 --shards '/data/val-00.tar' \\\n"
        "    --patch-size 16 --steps 50 --replacement blur --max-samples 1000",
    ),
    "reproduce": (
        "patternnet reproduce --dataset mnist --data /data/mnist --out runs/mnist",
        "patternnet reproduce --model torchvision:vgg16 --out runs/paper \\\n"
        "    --shards '/data/train-{0000..1023}.tar' --evaluate '/data/val-*.tar'",
    ),
    "grid": (
        "patternnet grid runs/vgg16 --worst 20 --columns 2",
        "patternnet grid runs/vgg16 --keys cat/1,dog/7 --out figure.pdf",
    ),
    "report": (
        "patternnet report runs/vgg16",
        "patternnet report runs/vgg16 runs/resnet50 --samples 50 --out both.html",
    ),
    "show": ("patternnet show runs/vgg16 cat/1 --out cat.png",),
    "doctor": (
        "patternnet doctor",
        "patternnet doctor --shards '/data/train-{0000..1023}.tar' --out /data/runs",
        "patternnet doctor --address HEAD:6379 --cpus-per-worker 4 --out s3://bucket",
    ),
    "submit": (
        "patternnet submit --address http://HEAD:8265 fit \\\n"
        "    --model torchvision:vgg16 --shards '/data/train-{0000..1023}.tar' \\\n"
        "    --out /data/runs/vgg16",
        "patternnet submit --address http://HEAD:8265 --no-wait status runs/vgg16",
    ),
}


def epilog(command: str) -> str:
    """What follows a command's options in its help."""
    shown = (f"  {escape(example)}".replace("\n", "\n  ") for example in EXAMPLES.get(command, ()))
    return "\n".join(["", "Examples", *shown])  # the empty line keeps the others' indentation
