"""The trained model in people's hands: what it needs beside the checkpoint, as a module, predictions, and export."""
