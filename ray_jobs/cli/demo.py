"""`patternnet demo`: everything on packaged weights and photographs."""

from ray_jobs.cli.arguments import echo
from ray_jobs.cli.options import command
from ray_jobs.config import Resources
from ray_jobs.config.commands import DemoOptions


@command("patternnet demo", "patternnet demo --out /tmp/demo --workers 0")
def demo(options: DemoOptions) -> None:
    """Fit, evaluate, explain and draw packaged photographs with packaged weights."""
    from ray_jobs.studies.demo import demo as run_demo

    picture = run_demo(options.out.absolute(), Resources(workers=options.workers, address=options.address))
    echo(
        f"""
Photographs and the maps of each method:                   {picture}
Quality of the patterns by layer and estimator:            {picture.parent / "run" / "quality.png"}
Patterns, tables and explanations of every photograph:     {picture.parent / "run"}
Shards for your own experiments:                           {picture.parent / "shards"}

Next, the same on your own images:
  patternnet pack IMAGES SHARDS                 a folder of class folders → shards
  patternnet fit --model torchvision:resnet50 --shards 'SHARDS/*.tar' --out RUN
  patternnet explain --patterns RUN --shards 'SHARDS/*.tar' --methods patternattribution"""
    )
