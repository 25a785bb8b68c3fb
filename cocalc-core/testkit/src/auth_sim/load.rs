//! What people do: they come, by tokens, sessions and SSH keys, and change who
//! may come.

use std::{collections::BTreeSet, rc::Rc};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_auth::{
    acl::{Ask, Proof},
    session::{SessionHash, SessionRecord},
    store::AclStore,
    token::{Algorithm, Audience, Claims, Expect, LEEWAY, TokenId, Usage, header_text},
};
use cocalc_ids::{Action, Scope, Timestamp};

use super::{
    check::{Facts, Right},
    host::Visit,
    master::{News, Signing},
    world::{Event, Ms, Sim, account_id, host_id, key_id, login_tag, project_id, session_bytes},
};

const ISSUER: &str = "https://master.example";
/// How many credentials people carry around.
const CARRIED_MAX: usize = 256;
/// One token in so many is really signed, and verified.
const SIGNED: u64 = 16;
const TOKEN_SECS: u64 = 60;

/// What people carry around.
#[derive(Debug, Default)]
pub(super) struct Load {
    tokens: Vec<Token>,
    sessions: Vec<Session>,
}

#[derive(Clone, Debug)]
struct Token {
    account: u32,
    project: u32,
    host: usize,
    login: u64,
    under: Option<u64>,
    signer: u64,
    claims: Rc<Claims>,
    text: Option<Rc<str>>,
}

#[derive(Clone, Copy, Debug)]
struct Session {
    hash: SessionHash,
    account: u32,
    project: u32,
    host: usize,
    login: u64,
    under: Option<u64>,
    signer: u64,
}

impl Sim {
    pub(super) fn visit(&mut self) {
        if !self.faulty {
            return;
        }
        let wait = self.around(self.scenario.visit_ms);
        self.after(wait, Event::Visit);
        match self.below(10) {
            0..=3 => {
                let Some((project, account)) = self.somebody() else { return };
                if let Some(token) = self.mint(project, account) {
                    let opens = self.below(2) == 0;
                    self.show_token(&token, opens);
                    let at = self.pick(CARRIED_MAX);
                    carry(&mut self.load.tokens, at, token);
                }
            }
            4..=5 if !self.load.tokens.is_empty() => {
                let at = self.pick(self.load.tokens.len());
                let token = self.load.tokens[at].clone();
                self.show_token(&token, false);
            }
            6..=7 if !self.load.sessions.is_empty() => {
                let at = self.pick(self.load.sessions.len());
                let session = self.load.sessions[at];
                self.show_session(session);
            }
            _ => {
                let Some((project, account)) = self.somebody() else { return };
                self.show_key(project, account);
            }
        }
    }

    /// A project, and a member of it as a rule.
    fn somebody(&mut self) -> Option<(u32, u32)> {
        let project = self.pick(self.master.db.projects.len());
        let members = self.master.db.projects[project].members.len();
        let account = if self.below(8) == 0 {
            self.pick(self.master.db.accounts.len()) as u32
        } else {
            let at = self.pick(members);
            *self.master.db.projects[project].members.get(at)?
        };
        Some((project as u32, account))
    }

    /// The master gives a token to who may have one.
    fn mint(&mut self, project: u32, account: u32) -> Option<Token> {
        self.master.process.as_ref()?;
        let which = self.pick(5);
        let row = &self.master.db.projects[project as usize];
        let who = &self.master.db.accounts[account as usize];
        if !row.members.contains(&account) || who.banned {
            return None;
        }
        let signer = self.master.current_key_number()?;
        // Some are minted for no log-in.
        let under = who.log_ins.get(which).copied();
        let now = self.master_now();
        let iat = u64::try_from(now.secs()).ok()?;
        let claims = Claims {
            iss: ISSUER.to_owned(),
            aud: Audience(host_id(row.owner)),
            sub: account_id(account),
            prj: project_id(project),
            epoch: row.epoch,
            scp: Scope::ALL.iter().copied().collect::<BTreeSet<_>>(),
            iat,
            exp: iat + TOKEN_SECS,
            jti: token_id(under),
            sep: who.session_epoch,
            acl: row.version,
            usage: Usage::Multi,
            emb: None,
        };
        let (login, host) = (who.login, row.owner);
        let text = if self.below(SIGNED) == 0 {
            let signing = self.master.current_key()?;
            sign(&signing, &claims)
        } else {
            None
        };
        Some(Token { account, project, host, login, under, signer, claims: Rc::new(claims), text })
    }

    /// Whether the host takes the token for good: the real verifier for those
    /// that are really signed, the key's name and the times for the others.
    fn verify(&self, host: usize, token: &Token) -> bool {
        let machine = &self.hosts[host];
        let Some((now, skewed)) = machine.time(self.now, self.master_now()) else { return false };
        let (Some(daemon), false) = (&machine.daemon, skewed) else { return false };
        let verifier = daemon.cache.verifier();
        match &token.text {
            Some(text) => {
                let expect =
                    Expect { issuer: ISSUER, host: Some(host_id(host)), project: project_id(token.project) };
                verifier.verify(text, &expect, now).is_ok_and(|claims| claims == *token.claims)
            }
            None => {
                let kid = format!("k{}", token.signer);
                let begun = token.claims.issued() <= now.plus(LEEWAY);
                let ended = token.claims.expires().plus(LEEWAY) <= now;
                token.host == host && begun && !ended && verifier.kids().any(|known| known == kid)
            }
        }
    }

    fn show_token(&mut self, token: &Token, opens: bool) {
        let host = token.host;
        if !self.verify(host, token) {
            return;
        }
        let claims = &token.claims;
        let administer = !opens && self.below(6) == 0;
        let facts = Facts {
            account: token.account,
            project: token.project,
            login: Some(token.login),
            under: token.under,
            key: None,
            signer: Some(token.signer),
            administer,
        };
        let ask = Ask {
            account: claims.sub,
            project: claims.prj,
            action: if administer { Action::Administer } else { Action::Use(Scope::Ws) },
            epoch: Some(claims.epoch),
            session_epoch: Some(claims.sep),
            login: Some(claims.jti.login()),
            acl: claims.acl,
            proof: Proof::Token,
        };
        if opens {
            self.open_session(host, token, &ask, facts);
        }
        let stays = !administer && self.below(2) == 0;
        self.come(host, Visit { ask, facts, stays, must: false });
    }

    /// Exchanges a token for a session, if no fetch is needed for that.
    fn open_session(&mut self, host: usize, token: &Token, ask: &Ask, facts: Facts) {
        let held = self.hosts[host].held.get(&token.project).copied();
        if self.decide(host, ask, held).is_none_or(|verdict| verdict.outcome.is_err()) {
            return;
        }
        self.check_allowed(host, &facts, false);
        let hash = SessionHash::from_bytes(session_bytes(self.name()));
        let created =
            self.hosts[host].time(self.now, self.master_now()).map_or(Timestamp::from_secs(0), |t| t.0);
        let record = SessionRecord {
            account: ask.account,
            project: ask.project,
            scopes: token.claims.scp.clone(),
            session_epoch: token.claims.sep,
            login: Some(token.claims.jti.login()),
            acl: token.claims.acl,
            embed_origin: None,
            created,
        };
        let _ = self.hosts[host].disk.store.insert_session(&hash, &record);
        let Token { account, project, login, under, signer, .. } = *token;
        let at = self.pick(CARRIED_MAX);
        carry(&mut self.load.sessions, at, Session { hash, account, project, host, login, under, signer });
    }

    fn show_session(&mut self, session: Session) {
        let host = session.host;
        let Ok(Some(record)) = self.hosts[host].disk.store.session(&session.hash) else { return };
        let facts = Facts {
            account: session.account,
            project: session.project,
            login: Some(session.login),
            under: session.under,
            key: None,
            signer: Some(session.signer),
            administer: false,
        };
        let ask = Ask {
            account: record.account,
            project: record.project,
            action: Action::Use(Scope::Http),
            epoch: None,
            session_epoch: Some(record.session_epoch),
            login: record.login,
            acl: record.acl,
            proof: Proof::Session(session.hash),
        };
        let stays = self.below(3) == 0;
        self.come(host, Visit { ask, facts, stays, must: false });
    }

    fn show_key(&mut self, project: u32, account: u32) {
        let Some(key) = self.master.db.accounts[account as usize].key else { return };
        let host = self.master.db.projects[project as usize].owner;
        // A project that is not known is refused by the decision, after a fetch.
        if self.find_key(host, project_id(project), key) == Some(false) {
            return;
        }
        let facts = Facts {
            account,
            project,
            login: None,
            under: None,
            key: Some(key),
            signer: None,
            administer: false,
        };
        let visit = Visit { ask: key_ask(&facts, key), facts, stays: self.below(2) == 0, must: false };
        self.come(host, visit);
    }

    pub(super) fn change(&mut self) {
        if !self.faulty {
            return;
        }
        let wait = self.around(self.scenario.change_ms);
        self.after(wait, Event::Change);
        let project = self.pick(self.master.db.projects.len()) as u32;
        let account = self.pick(self.master.db.accounts.len()) as u32;
        let member = {
            let at = self.pick(self.master.db.projects[project as usize].members.len());
            self.master.db.projects[project as usize].members[at]
        };
        match self.below(100) {
            0..=24 => {
                let news = self.add_member(project, account);
                self.commit(news);
            }
            25..=49 => {
                let news = self.remove_member(project, member);
                self.commit(news);
            }
            50..=53 => {
                let news = self.sign_out(member, None);
                self.commit(news);
            }
            54..=59 => {
                for _ in 0..1 + self.below(2) {
                    let news = self.end_log_in(member);
                    self.commit(news);
                }
            }
            60..=64 => {
                let news = self.sign_out(member, Some(true));
                self.commit(news);
            }
            65..=71 => {
                let news = self.sign_out(account, Some(false));
                self.commit(news);
                let banned = self.master.db.accounts.iter().position(|account| account.banned);
                if let Some(banned) = banned {
                    let news = self.sign_out(banned as u32, Some(false));
                    self.commit(news);
                }
            }
            72..=81 => {
                for _ in 0..1 + self.below(3) {
                    let news = self.change_key(member);
                    self.commit(news);
                }
            }
            82..=88 => {
                let grace = [None, Some(0), Some(5_000), Some(120_000), Some(1_800_000)][self.pick(5)];
                let news = self.change_grace(project, grace);
                self.commit(news);
            }
            89..=95 => {
                let to = self.pick(self.hosts.len());
                let news = self.move_project(project, to);
                self.commit(news);
            }
            // There is one ring, however many hosts there are.
            _ if self.below(self.hosts.len() as u64) >= 10 => {}
            _ => {
                let withdraw = self.below(3) == 0;
                let news = self.rotate(withdraw);
                self.commit(news);
            }
        }
    }

    /// Tells what was committed, and plans to look whether it is in force.
    pub(super) fn commit(&mut self, news: Option<News>) {
        let Some(news) = news else { return };
        self.note(|| format!("committed: {news:?}"));
        if let News::Project(_, rights, _) | News::Account(_, rights) = &news {
            for right in rights.clone() {
                if self.truth.holds(right) {
                    continue;
                }
                let hosts = match right {
                    Right::Member(project, _) => vec![self.master.db.projects[project as usize].owner],
                    Right::Welcome(account)
                    | Right::Login(account, _)
                    | Right::LogIn(account, _)
                    | Right::Key(account, _) => self.master.hosts_of_account(account),
                    Right::Signer(_) | Right::Owned(_) => Vec::new(),
                };
                for host in hosts {
                    for facts in self.facts_of(right, host) {
                        self.plan_probes(host, &facts);
                    }
                }
            }
        }
        self.committed(news);
    }

    /// The worst moment to take a right away: while an answer to a keepalive is
    /// under way, which is the last thing that the host hears.
    pub(super) fn pounce(&mut self, host: usize, delay: Ms) {
        let Some(project) = self.master.owned[host].first().copied() else { return };
        let Some(member) = self.master.db.projects[project as usize].members.last().copied() else { return };
        self.cut(host, true, false, delay);
        let news = self.remove_member(project, member);
        self.commit(news);
    }

    /// At the end: a grant whose frames were lost is found by a fetch.
    pub(super) fn drill(&mut self, step: u8, project: u32, account: u32) {
        let host = self.master.db.projects[project as usize].owner;
        let facts =
            Facts { account, project, login: None, under: None, key: None, signer: None, administer: false };
        let ask = |acl| Ask {
            account: account_id(account),
            project: project_id(project),
            action: Action::Use(Scope::Ws),
            epoch: None,
            session_epoch: None,
            login: None,
            acl,
            proof: Proof::Token,
        };
        let version = self.master.db.projects[project as usize].version;
        match step {
            // What nobody can have: the fetch fails, and is not repeated.
            0 => {
                self.come(host, Visit { ask: ask(version + 1000), facts, stays: false, must: false });
                self.after(8_000, Event::Drill { step: 1, project, account });
            }
            // The grant does not get through.
            1 => {
                let Some(news) = self.add_member(project, account) else { return };
                self.links[host].deaf = true;
                self.committed(news);
                self.after(50, Event::Drill { step: 2, project, account });
            }
            _ => {
                self.links[host].deaf = false;
                let must = self.truth.all_hold(&facts);
                self.come(host, Visit { ask: ask(version), facts, stays: false, must });
            }
        }
    }
}

/// The id of a token that is minted under a log-in, or under none.
fn token_id(under: Option<u64>) -> TokenId {
    let tag = under.map(|under| login_tag(under).to_string()).unwrap_or_default();
    let mut id = [0; 16];
    for (at, byte) in id.iter_mut().take(8).enumerate() {
        *byte = tag.get(2 * at..2 * at + 2).and_then(|two| u8::from_str_radix(two, 16).ok()).unwrap_or(0);
    }
    TokenId::from_bytes(id)
}

fn key_ask(facts: &Facts, key: u64) -> Ask {
    Ask {
        account: account_id(facts.account),
        project: project_id(facts.project),
        action: Action::Use(Scope::Ssh),
        epoch: None,
        session_epoch: None,
        login: None,
        acl: 0,
        proof: Proof::Key(key_id(key)),
    }
}

fn carry<T>(all: &mut Vec<T>, at: usize, one: T) {
    if all.len() < CARRIED_MAX {
        all.push(one);
    } else if let Some(place) = all.get_mut(at) {
        *place = one;
    }
}

fn sign(signing: &Signing, claims: &Claims) -> Option<Rc<str>> {
    let header = URL_SAFE_NO_PAD.encode(header_text(Algorithm::EdDsa, &signing.kid));
    let payload = URL_SAFE_NO_PAD.encode(serde_json::to_vec(claims).ok()?);
    let signed = format!("{header}.{payload}");
    let signature = URL_SAFE_NO_PAD.encode(signing.identity.sign(signed.as_bytes()));
    Some(format!("{signed}.{signature}").into())
}
