"""What every stage needs: its process, its command line, its run folder, its manifest."""
