"""The llm critic: a judge reached through litellm scores each step."""
