"""Models as ordinary Hugging Face folders: policy, reward model, critic."""
