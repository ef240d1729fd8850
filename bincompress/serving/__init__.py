"""A model behind HTTP: the forms of OpenAI and of Ollama, a page to chat on, and bounds on everything that is asked."""
