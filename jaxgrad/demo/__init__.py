"""The main job: four models on real data, studied as any user's model is.

`models` makes them, `study` trains one while watching its gradient, `loading` reads a user's file.
"""
