"""One step of all tasks on flat buffers: it knows no method, no image, no rank."""
