"""`/v1/responses`: OpenAI's API of items, with conversations that the server keeps."""
