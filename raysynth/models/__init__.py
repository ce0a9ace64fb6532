"""What is trained: architecture, loss, optimiser, export. No ray."""
