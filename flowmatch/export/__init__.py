"""What is exported to diffusers: the scheduler, the pipeline, the model card."""
