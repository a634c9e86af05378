"""Reads a project by ViRelAy, in a Python environment of its own: `python virelay_reader.py PROJECT OUT`.

Writes what ViRelAy finds to a file of arrays. It imports nothing else, because ViRelAy needs an older Pillow.
"""

import json
import sys

import numpy as np
from virelay import model

COLOR_MAPS = ("black-fire-red", "blue-white-red")


def main() -> None:
    """Read the project."""
    workspace = model.Workspace()
    workspace.add_project(sys.argv[1])
    (name,) = workspace.get_project_names()
    project = workspace.get_project(name)
    arrays, samples = {}, []
    for number in range(len(project.dataset)):
        sample, attribution = project.get_sample(number), project.get_attribution(number)
        arrays[f"data-{number}"], arrays[f"attribution-{number}"] = sample.data, attribution.data
        arrays[f"prediction-{number}"] = attribution.prediction
        for color_map in COLOR_MAPS:
            arrays[f"heat-{color_map}-{number}"] = attribution.render_heatmap(color_map)
            over = attribution.render_heatmap(color_map, image_to_superimpose=sample.data)
            arrays[f"over-{color_map}-{number}"] = over
        samples.append([each.labels[0].name for each in (sample, attribution)])
    (method,) = project.get_analysis_methods()
    (clustering,) = project.get_analysis_clustering_names(method)
    (embedding,) = project.get_analysis_embedding_names(method)
    categories = []
    for number, category in enumerate(project.get_analysis_categories(method)):
        analysis = project.get_analysis(method, category.name, clustering, embedding)
        categories.append(category.human_readable_name)
        for name in ("attribution_indices", "clustering", "embedding"):
            arrays[f"{name}-{number}"] = np.asarray(getattr(analysis, name))
    workspace.close()
    np.savez(sys.argv[2], text=json.dumps({"samples": samples, "categories": categories}), **arrays)


if __name__ == "__main__":
    main()
