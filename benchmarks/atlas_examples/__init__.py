"""The examples of docs/atlas.md: handwritten digits, and crops of photographs."""
