"""Text in, structure out: prompts, step segmentation, final answers, equations."""
