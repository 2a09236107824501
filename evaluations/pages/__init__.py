"""What all pages share: their frame, styles and pictures. A page is one HTML file, which loads nothing."""
