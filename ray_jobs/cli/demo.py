"""`patternnet demo`: everything on packaged weights and photographs."""

from ray_jobs.cli.arguments import echo
from ray_jobs.cli.typer_options import command
from ray_jobs.config import Resources
from ray_jobs.config.commands import DemoOptions


@command("patternnet demo", "patternnet demo --out /tmp/demo --workers 0")
def demo(options: DemoOptions) -> None:
    """Fit and explain two networks on packaged photographs with packaged weights, and draw pictures."""
    from ray_jobs.studies.demo import demo as run_demo

    signals, classes = run_demo(options.out.absolute(), Resources(workers=options.workers, address=options.address))
    folder = signals.parent
    echo(
        f"""
VGG-16: what the strongest channel of each photograph sees:  {signals}
EfficientNet-Lite0: the evidence for the predicted class:    {classes}
Patterns, tables and explanations of every photograph:       {folder / "signals"}, {folder / "classes"}
Shards for your own experiments:                             {folder / "shards"}

Next, which method fits this network best, and the same on your own images:
  patternnet evaluate --patterns {folder / "classes"} --shards '{folder / "shards"}/explain/*.tar'
  patternnet pack IMAGES SHARDS                 a folder of class folders → shards
  patternnet fit --model torchvision:resnet50 --shards 'SHARDS/*.tar' --out RUN
  patternnet explain --patterns RUN --shards 'SHARDS/*.tar' --methods patternattribution"""
    )
