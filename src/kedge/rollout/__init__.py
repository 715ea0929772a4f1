"""From prompts to responses, and what the models say about them."""
