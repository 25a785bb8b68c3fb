//! The conat message bus: broker and client over WebSocket.
