//! Where the repository of a project is, and with what credentials.

use std::{path::Path, process::Stdio, time::Duration};

use cocalc_auth::key_file;
use cocalc_backup::{Access, Gcs, GcsCredentials, Location, S3, Secret};
use cocalc_core::BoxError;
use cocalc_ids::ProjectId;
use serde::Deserialize;

use super::config::{BackupsConfig, PlaceKind};

/// How long the program that makes credentials may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(20);
/// The most that it may print.
const COMMAND_BYTES_MAX: usize = 64 * 1024;

/// Credentials of S3, as its own programs print them or as files have them.
#[derive(Deserialize)]
struct S3Credentials {
    #[serde(alias = "AccessKeyId")]
    access_key_id: String,
    #[serde(alias = "SecretAccessKey")]
    secret_access_key: Secret,
    #[serde(default, alias = "SessionToken")]
    session_token: Option<Secret>,
}

/// A short-lived token of Google Cloud Storage.
#[derive(Deserialize)]
struct GcsToken {
    access_token: Secret,
}

/// The place of the repository of `project`, with credentials for `access`.
pub(super) async fn location(
    config: &BackupsConfig,
    project: ProjectId,
    access: Access,
) -> Result<Location, BoxError> {
    let bucket = config.bucket.clone().unwrap_or_default();
    let prefix = [config.prefix.as_str(), &project.to_string()]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("/");
    Ok(match config.kind {
        PlaceKind::Directory => {
            let root = config.directory.as_deref().ok_or("backups.directory is not set")?;
            Location::Directory { path: root.join(project.to_string()) }
        }
        PlaceKind::S3 => {
            let text = credentials(config, access, &bucket, &prefix).await?;
            let own: S3Credentials = serde_json::from_str(text.expose())
                .map_err(|_| "the credentials are not JSON with access_key_id and secret_access_key")?;
            Location::S3(S3 {
                bucket,
                prefix,
                region: config.region.clone().unwrap_or_default(),
                endpoint: config.endpoint.clone(),
                access_key_id: own.access_key_id,
                secret_access_key: own.secret_access_key,
                session_token: own.session_token,
            })
        }
        PlaceKind::Gcs => {
            let text = credentials(config, access, &bucket, &prefix).await?;
            let credentials = match serde_json::from_str::<GcsToken>(text.expose()) {
                Ok(token) => GcsCredentials::Token(token.access_token),
                // An emulator takes anybody.
                Err(_) if text.expose().trim() == r#"{"anonymous":true}"# => GcsCredentials::Anonymous,
                Err(_) => GcsCredentials::ServiceAccount(text),
            };
            Location::Gcs(Gcs { bucket, prefix, endpoint: config.endpoint.clone(), credentials })
        }
    })
}

/// The same place without credentials, for people.
pub(super) fn shown(config: &BackupsConfig) -> String {
    match config.kind {
        PlaceKind::Directory => config.directory.as_deref().unwrap_or(Path::new("")).display().to_string(),
        PlaceKind::S3 => format!("s3:{}/{}", config.bucket.as_deref().unwrap_or_default(), config.prefix),
        PlaceKind::Gcs => format!("gs:{}/{}", config.bucket.as_deref().unwrap_or_default(), config.prefix),
    }
}

async fn credentials(
    config: &BackupsConfig,
    access: Access,
    bucket: &str,
    prefix: &str,
) -> Result<Secret, BoxError> {
    if let Some(program) = &config.credentials_command {
        return minted(program, access, bucket, prefix).await;
    }
    let file = match access {
        Access::Append => &config.append_credentials_file,
        Access::Read => match &config.read_credentials_file {
            None => &config.append_credentials_file,
            file => file,
        },
        Access::Delete => &config.delete_credentials_file,
    };
    let file = file.clone().ok_or("there are no credentials for that in [backups]")?;
    let bytes = tokio::task::spawn_blocking(move || {
        key_file::load(&file)?.ok_or_else(|| BoxError::from(format!("{} is not there", file.display())))
    });
    let bytes = bytes.await??;
    Ok(Secret::new(std::str::from_utf8(&bytes).map_err(|_| "the credentials are not text")?))
}

/// What the operator's program prints for one repository.
async fn minted(program: &Path, access: Access, bucket: &str, prefix: &str) -> Result<Secret, BoxError> {
    let access = match access {
        Access::Append => "append",
        Access::Read => "read",
        Access::Delete => "delete",
    };
    let child = tokio::process::Command::new(program)
        .args([access, bucket, prefix])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let shown = program.display();
    let output = tokio::time::timeout(COMMAND_LIMIT, child)
        .await
        .map_err(|_| format!("{shown} took longer than {} s", COMMAND_LIMIT.as_secs()))?
        .map_err(|error| format!("cannot run {shown}: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said: String = said.trim().chars().filter(|c| !c.is_control()).take(300).collect();
        return Err(format!("{shown} ended with {}: {said}", output.status).into());
    }
    if output.stdout.len() > COMMAND_BYTES_MAX {
        return Err(format!("{shown} printed more than credentials have").into());
    }
    Ok(Secret::new(String::from_utf8(output.stdout).map_err(|_| format!("{shown} printed no text"))?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn config(text: &str) -> BackupsConfig {
        let config: BackupsConfig = cocalc_daemon::config::parse("backups", text, []).unwrap();
        config.validate().unwrap();
        config
    }

    #[tokio::test]
    async fn a_program_gives_credentials_for_one_repository() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("mint");
        let script = "#!/bin/sh\n[ \"$1\" = read ] && { echo no such right >&2; exit 3; }\n\
            echo \"{\\\"AccessKeyId\\\":\\\"$1\\\",\\\"SecretAccessKey\\\":\\\"$2\\\",\\\"SessionToken\\\":\\\"$3\\\"}\"\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let config = config(&format!(
            "kind='s3'\nbucket='b'\nregion='r'\nprefix='x/y'\ncredentials_command='{}'",
            program.display()
        ));
        let project = ProjectId::random();
        let Location::S3(s3) = location(&config, project, Access::Append).await.unwrap() else { panic!() };
        assert_eq!((s3.access_key_id.as_str(), s3.prefix), ("append", format!("x/y/{project}")));
        assert_eq!(s3.session_token.unwrap().expose(), format!("x/y/{project}"));
        let error = location(&config, project, Access::Read).await.unwrap_err().to_string();
        assert!(error.contains("no such right"), "{error}");
    }

    #[tokio::test]
    async fn files_give_each_access_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            path.display().to_string()
        };
        let append = file("append", r#"{"access_token":"a"}"#);
        let delete = file("delete", r#"{"anonymous":true}"#);
        let config = config(&format!(
            "kind='gcs'\nbucket='b'\nhosts_share_credentials=true\nappend_credentials_file='{append}'\n\
             delete_credentials_file='{delete}'"
        ));
        for (access, expected) in [
            (Access::Append, GcsCredentials::Token(Secret::new("a"))),
            (Access::Read, GcsCredentials::Token(Secret::new("a"))),
            (Access::Delete, GcsCredentials::Anonymous),
        ] {
            let place = location(&config, ProjectId::random(), access).await.unwrap();
            let Location::Gcs(gcs) = place else { panic!() };
            assert_eq!(gcs.credentials, expected);
        }
        std::fs::set_permissions(&append, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(location(&config, ProjectId::random(), Access::Append).await.is_err(), "anybody may read it");
    }
}
