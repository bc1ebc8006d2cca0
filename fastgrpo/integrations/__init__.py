"""The loss in other people's trainers: one module for each, which imports that trainer alone."""
