"""Where a stream's memory is: pages of the KV cache on the device, their names, and copies of them in host memory."""
